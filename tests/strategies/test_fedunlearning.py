from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import records
from fedllm_flwr.journal import open_ledger
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.seeding import derive_seed
from strategies.fedunlearning import Unlearnable, merging_of, staying
from strategies.observer import MERGING
from strategies.private import Unprotected
from strategies.sampling import draw_cohort
from strategies.sift import SiftMerge

Fixture = Callable[..., Any]
LEDGER = ("unlearning=ledger", "num_rounds=2")
METHODS = {
    "lora": (),
    "b_only": ("method.sharing=b_only",),
    "prompt": ("method=fedprompt",),
}


def ledger_of(played: Any) -> Any:
    ledger = open_ledger(played.run)
    assert ledger is not None
    return ledger


@pytest.fixture(scope="module", params=METHODS)
def kept(request: pytest.FixtureRequest, micro: Fixture, play: Fixture) -> Any:
    return play(micro(*METHODS[request.param], *LEDGER))


def test_the_model_is_the_start_and_every_weighted_mean_of_the_ledger(kept: Any) -> None:
    ledger, strategy = ledger_of(kept), kept.strategy
    assert ledger.rounds() == (1, 2)
    saved, last = (checkpoints.at(kept.run.checkpoints, r) for r in (0, 2))
    assert saved is not None
    assert last is not None
    strategy.begin_sum(3)
    [end] = strategy.start_values(3).values()
    total = np.zeros(ledger.size)
    for server_round in ledger.rounds():
        contributions = ledger.read(server_round).contributions
        weights = [c.weight for c in contributions]
        total += np.average(
            [c.update.astype(np.float64) for c in contributions], axis=0, weights=weights
        )
    strategy.resume(saved)
    strategy.begin_sum(1)
    [start] = strategy.start_values(1).values()
    np.testing.assert_allclose(end, start + total, atol=1e-6)
    strategy.resume(last)


def test_weights_and_addresses_are_the_clients(kept: Any) -> None:
    trained = {(r["round"], r["partition_id"]): r for r in kept.run.records("client")}
    for server_round in (1, 2):
        for each in ledger_of(kept).read(server_round).contributions:
            assert each.weight == trained[server_round, each.client]["num_examples"]
            assert each.seed == ("client", each.client, server_round)
            assert derive_seed(kept.strategy.config.seed, *each.seed) >= 0


def test_a_ledger_keeps_every_checkpoint_and_changes_no_bit(
    kept: Any, micro: Fixture, play: Fixture
) -> None:
    assert checkpoints.saved_rounds(kept.run.checkpoints) == (0, 1, 2)
    if "shared" in kept.strategy.checkpoint(2).arrays:
        plain = play(micro("method=fedprompt", "num_rounds=2", "keep_checkpoints=1"))
        assert plain.sha == kept.sha
        assert checkpoints.saved_rounds(plain.run.checkpoints) == (2,)
        assert open_ledger(plain.run) is None


def test_a_resumed_run_writes_the_same_ledger(micro: Fixture, play: Fixture) -> None:
    """Killed after the second round's index was written and before its checkpoint was."""
    config = micro(*LEDGER)
    whole = play(config)
    before = {p.name: p.read_bytes() for p in (whole.run.path / "ledger").rglob("*") if p.is_file()}
    for path in (whole.run.checkpoints / "round-0002").iterdir():
        path.unlink()
    (whole.run.checkpoints / "round-0002").rmdir()
    again = play(config, folder=whole.run.path)
    after = {p.name: p.read_bytes() for p in (again.run.path / "ledger").rglob("*") if p.is_file()}
    assert again.sha == whole.sha
    assert after == before


def test_a_removed_client_is_passed_over_where_it_is_drawn(micro: Fixture, play: Fixture) -> None:
    config = micro("unlearning.removed=[1]", "strategy.cohort_fraction=0.5", "num_rounds=3")
    played = play(config, splits=("test",))
    for record in played.run.records("round")[1:]:
        drawn = draw_cohort(config.seed, record["round"], range(4), 0.5)
        assert record["cohort"] == [p for p in drawn if p != 1]
    asked = {p for m in played.grid.sent for p in records.read_body(m).get("partition-ids", ())}
    assert asked == {0, 2, 3}
    assert {r["partition_id"] for r in played.run.records("evaluation")} <= {0, 2, 3}


def test_a_round_whose_whole_cohort_was_removed_leaves_the_model_as_it_is(
    micro: Fixture, play: Fixture
) -> None:
    config = micro("strategy.cohort_fraction=0.25", "num_rounds=1", "unlearning=ledger")
    [drawn] = draw_cohort(config.seed, 1, range(4), 0.25)
    gone = play(micro("strategy.cohort_fraction=0.25", "num_rounds=1", "unlearning=ledger",
                      f"unlearning.removed=[{drawn}]"))  # fmt: skip
    start = checkpoints.at(gone.run.checkpoints, 0)
    end = checkpoints.at(gone.run.checkpoints, 1)
    assert start is not None
    assert end is not None
    assert end.arrays["adapter"].tobytes() == start.arrays["adapter"].tobytes()
    assert open_ledger(gone.run) is None


def test_who_stays(micro: Fixture) -> None:
    assert staying(micro("unlearning.removed=[0,2]"), [3, 2, 1, 0]) == [3, 1]


def test_what_merges_is_what_was_asked_for(micro: Fixture, play: Fixture) -> None:
    observer = play(micro("num_rounds=1")).strategy.observer
    assert type(merging_of(micro(), observer)) is Unprotected
    kept = merging_of(micro("unlearning=ledger"), observer)
    assert isinstance(kept, Unlearnable)
    assert type(kept.inner) is Unprotected
    sift = ("strategy=sift_merge", "method.sharing=b_only", "num_rounds=1")
    assert isinstance(merging_of(micro(*sift), observer), SiftMerge)


def test_what_merging_keeps_is_in_the_checkpoint_under_a_name_of_its_own(
    micro: Fixture, play: Fixture
) -> None:
    sift = ("method=fedprompt", "strategy=sift_merge", "num_rounds=1", "unlearning=ledger")
    played = play(micro(*sift))
    saved = played.strategy.snapshot(1)
    own = {n for n in saved.arrays if n.startswith(MERGING)}
    assert f"{MERGING}sum" in own
    again = play(micro(*sift)).strategy
    again.resume(saved)
    assert sorted(again.parts) == ["shared"], "they are no part of the prompt"
    assert sorted(again.snapshot(1).arrays) == sorted(saved.arrays)
