from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm_flwr import records
from fedllm_flwr.journal import Journal, open_ledger, peak_memory_bytes, selection_score
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.unlearning.ledger import Contribution
from strategies.observer import Checkpointed

Fixture = Callable[..., Any]


def state(server_round: int) -> Checkpointed:
    return Checkpointed(
        server_round, {"adapter": np.full(3, server_round, np.float32)}, {"delta_ranks": {}}
    )


def record(server_round: int, **figures: float) -> dict[str, Any]:
    return {"kind": "round", "round": server_round, "rounds": 9, **figures}


@pytest.fixture
def keep(micro: Fixture, tmp_path: Path) -> Callable[..., Journal]:
    """A journal over the test's run directory, as a new process would open it."""
    stream = StringIO()

    def opened(*overrides: str) -> Journal:
        exists = (tmp_path / "run" / "manifest.json").exists()
        run = (
            RunDirectory.open(tmp_path / "run")
            if exists
            else RunDirectory.create(tmp_path / "run", {})
        )
        journal = Journal(run, micro(*overrides), Progress(stream))
        journal.shown = stream  # type: ignore[attr-defined]
        return journal

    return opened


BEST = "selection=best_validation"


def test_a_round_is_kept_before_its_checkpoint(keep: Fixture) -> None:
    journal = keep()
    journal.finished(record(0, accuracy=0.25), state(0))
    (kept,) = journal.run.records("round")
    assert kept["accuracy"] == 0.25
    assert kept["uplink_bytes"] == kept["downlink_bytes"] == 0
    assert kept["seconds"] > 0
    assert 10**7 < kept["server_memory_bytes"] <= peak_memory_bytes()
    saved = checkpoints.latest(journal.run.checkpoints)
    assert saved is not None
    np.testing.assert_array_equal(saved.arrays["adapter"], np.zeros(3, np.float32))


def test_only_the_newest_checkpoints_stay(keep: Fixture) -> None:
    journal = keep("keep_checkpoints=2")
    for server_round in range(5):
        journal.finished(record(server_round), state(server_round))
    assert sorted(p.name for p in journal.run.checkpoints.iterdir()) == ["round-0003", "round-0004"]


def test_bytes_are_of_one_round_by_kind_and_direction(keep: Fixture, edge_grid: Fixture) -> None:
    edge_grid(1)
    journal = keep()
    message = Message(
        records.instruction({}, {"x": np.ones(50, np.float32)}, "float32"), 7, "train"
    )
    size = records.serialized_bytes(message)
    for kind, direction in (("train", "uplink"), ("train", "uplink"), ("train", "downlink"),
                            ("evaluate", "uplink"), ("query.describe", "downlink")):  # fmt: skip
        journal.count(kind, direction, message)
    journal.finished(record(1), state(1))
    journal.finished(record(2), state(2))
    found = [(b["round"], b["message"], b["direction"], b["bytes"], b["messages"])
             for b in journal.run.records("bytes")]  # fmt: skip
    assert found == [
        (1, "evaluate", "uplink", size, 1),
        (1, "query", "downlink", size, 1),
        (1, "train", "downlink", size, 1),
        (1, "train", "uplink", 2 * size, 2),
    ]
    one, two = journal.run.records("round")
    assert (one["uplink_bytes"], one["downlink_bytes"]) == (2 * size, size)
    assert (two["uplink_bytes"], two["downlink_bytes"]) == (0, 0)
    for line in (one, two):
        assert (line["uplink_bytes_so_far"], line["downlink_bytes_so_far"]) == (2 * size, size)
    again = keep()
    again.resume(1)
    again.finished(record(2), state(2))
    last = again.run.records("round")[-1]
    assert last["uplink_bytes_so_far"] == 2 * size, "a resumed run goes on counting"


def test_what_happens_is_kept_and_shown(keep: Fixture) -> None:
    journal = keep("num_rounds=7")
    journal.started(3, [0, 2])
    journal.client({"kind": "client", "round": 3, "partition_id": 0})
    journal.failure(3, 2, "expected 4, got 5")
    journal.evaluated({"kind": "evaluation", "round": 3, "partition_id": 0})
    journal.note("something")
    assert journal.run.records() == [
        {"kind": "started", "round": 3, "rounds": 7, "cohort_size": 2},
        {"kind": "client", "round": 3, "partition_id": 0},
        {"kind": "failure", "round": 3, "partition_id": 2, "reason": "expected 4, got 5"},
        {"kind": "evaluation", "round": 3, "partition_id": 0},
        {"kind": "event", "text": "something"},
    ]
    assert journal.shown.getvalue().splitlines() == [
        "round 3 of 7: 2 clients asked",
        "round 3: client 2 is left out: expected 4, got 5",
        "something",
    ]


def test_resuming_forgets_what_came_after_the_checkpoint_and_nothing_else(keep: Fixture) -> None:
    journal = keep()
    journal.run.append({"kind": "baseline", "name": "majority"})
    for server_round in range(3):
        journal.failure(server_round, 1, "x")
        journal.finished(record(server_round), state(server_round))
    journal.failure(3, 1, "x")
    again = keep()
    again.resume(2)
    assert [f["round"] for f in again.run.records("failure")] == [0, 1, 2]
    again.resume(-1)
    assert again.run.records() == [{"kind": "baseline", "name": "majority"}], (
        "it need not be measured again"
    )


SCORES = {0: 0.2, 1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6}


def played(journal: Journal, rounds: range) -> None:
    for server_round in rounds:
        journal.finished(
            record(server_round, validation_accuracy=SCORES[server_round]), state(server_round)
        )


def best_on_disk(journal: Journal) -> int | None:
    best = checkpoints.latest(journal.run.path / "best")
    return best.server_round if best else None


def test_the_first_best_round_on_validation_rows_is_kept(keep: Fixture) -> None:
    journal = keep(BEST)
    played(journal, range(5))
    assert journal.best == (0.7, 2)
    assert best_on_disk(journal) == 2


def test_a_resumed_run_remembers_its_best_round(keep: Fixture) -> None:
    played(keep(BEST), range(4))
    again = keep(BEST)
    again.resume(3)
    assert again.best == (0.7, 2)
    played(again, range(4, 5))
    assert (again.best, best_on_disk(again)) == ((0.7, 2), 2)


def test_a_best_round_that_is_forgotten_gives_way_to_the_one_before(keep: Fixture) -> None:
    played(keep(BEST), range(3))
    again = keep(BEST)
    again.resume(1)
    assert again.best == (0.5, 1)
    played(again, range(2, 5))
    assert (again.best, best_on_disk(again)) == ((0.7, 2), 2)


def test_without_selection_no_best_round_is_kept(keep: Fixture) -> None:
    journal = keep()
    played(journal, range(3))
    assert not (journal.run.path / "best").exists()


@pytest.mark.parametrize(
    ("figures", "score"),
    [
        ({"validation_accuracy": 0.5, "validation_loss": 9.0}, 0.5),
        ({"validation_loss": 2.0}, -2.0),
        ({"accuracy": 0.9}, None),
    ],
)
def test_scores_are_accuracy_or_minus_the_loss(
    figures: dict[str, float], score: float | None
) -> None:
    assert selection_score(record(1, **figures)) == score


def test_a_release_of_noised_values_outlives_the_round_that_made_it(keep: Fixture) -> None:
    journal = keep()
    journal.finished(record(0), state(0))
    release = {"kind": "privacy", "of_round": 1, "releases": 1, "clients": []}
    journal.evaluated(release)
    assert list(journal.kept("privacy")) == [release]
    journal.resume(0)
    assert list(keep().kept("privacy")) == [release]


def test_updates_count_once_their_round_is_complete(keep: Fixture) -> None:
    journal = keep("unlearning=ledger")
    assert open_ledger(journal.run) is None
    update = np.arange(3, dtype=np.float32)
    journal.finished(record(0), state(0))
    journal.contributed(1, Contribution(2, 5.0, update))
    ledger = open_ledger(journal.run)
    assert ledger is not None
    assert ledger.rounds() == ()
    journal.finished(record(1), state(1))
    [kept] = ledger.read(1).contributions
    assert (kept.client, kept.weight) == (2, 5.0)
    np.testing.assert_array_equal(kept.update, update)
    assert ledger.retention == micro_retention(journal)
    journal.contributed(2, Contribution(0, 1.0, update))
    again = keep("unlearning=ledger")
    again.resume(0)
    assert ledger.rounds() == ()
    again.contributed(1, Contribution(3, 1.0, update))
    again.finished(record(1), state(1))
    assert list(ledger.listed(1)) == [3]


def micro_retention(journal: Journal) -> str:
    return journal._config.unlearning.retention
