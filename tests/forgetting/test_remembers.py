import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.forgetting.prepare import KEPT, UNLEARNED, prepare
from fedllm_flwr.forgetting.remembers import memories
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.runs import checkpoints
from strategies.observer import MERGING

Fixture = Callable[..., Any]
WAYS = [("ledger", "rewind"), ("ledger", "replay"), ("ledger", "merge"), ("ledger", "retrain"),
        ("adam", "rewind"), ("sift_ledger", "exact_merge"), ("shards", "shards")]  # fmt: skip


def told(
    case: str, method: str, made: Fixture, kept_rounds: int = -1
) -> tuple[str, dict[str, str]]:
    request = read_request(made(case), "0", method)
    found = memories(request, request.new_config(), kept_rounds)
    return " | ".join(found.purged), {kept.what: kept.reason for kept in found.retained}


@pytest.mark.parametrize(("case", "method"), WAYS)
def test_what_is_said_to_be_gone_is_gone(
    case: str, method: str, made: Fixture, tmp_path: Path
) -> None:
    """Every file of the new directory is looked at for the client."""
    request = read_request(made(case), "0", method)
    run = prepare(request, tmp_path / "new")
    kept_rounds = run.manifest[UNLEARNED][KEPT]
    purged, retained = told(case, method, made, kept_rounds)
    assert "the client's own records in metrics.jsonl" in purged
    measured = [r["round"] for r in run.records("round")]
    assert max(measured, default=-1) == kept_rounds
    figures = [what for what in retained if what.startswith("figures of the rounds")]
    assert figures == [f"figures of the rounds up to {r}" for r in measured[-1:]]
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record.get("partition_id") != 0, record
        assert 0 not in record.get("cohort", ())
    for path in run.path.rglob("client-00000*"):
        pytest.fail(f"{path}: an update of the client")
    for server_round in checkpoints.saved_rounds(run.checkpoints):
        saved = checkpoints.at(run.checkpoints, server_round)
        assert saved is not None
        assert server_round < request.first_round or method in ("merge", "exact_merge")
        assert 0 not in saved.state.get("trained", ())
        assert f"{MERGING}mask/0" not in saved.arrays
        assert 0 not in saved.arrays.get(f"{MERGING}clients", [9])
    assert all(reason for reason in retained.values())
    assert any(what.startswith("the run run") for what in retained), "the old run is still there"


@pytest.mark.parametrize(
    ("case", "method", "gone", "kept"),
    [
        ("adam", "rewind", "moments of the server optimizer", "how the data was dealt"),
        ("ledger", "rewind", "its updates in the ledger", "how the data was dealt"),
        ("ledger", "merge", "its updates in the ledger", "the other clients' updates in the ledger"),
        ("ledger", "replay", "checkpoints after its first round", "the other clients' updates in the ledger"),
        ("shards", "shards", "its updates in the ledger", "the number of the client"),
        ("sift", "exact_merge", "its mask and the digest of its update", "the number of the client"),
    ],
)  # fmt: skip
def test_what_else_remembers_depends_on_the_method(
    case: str, method: str, gone: str, kept: str, made: Fixture
) -> None:
    purged, retained = told(case, method, made)
    assert gone in purged
    assert any(kept in what for what in retained)


def test_every_entry_of_a_run_directory_is_spoken_of(made: Fixture) -> None:
    """A new kind of thing that a run leaves has to be looked at before this list may grow."""
    known = {"manifest.json", "metrics.jsonl", "summary.json", "report.html", "tensorboard", "checkpoints",
             "ledger", "adapter", ".lock", "shards", "clients"}  # fmt: skip
    for case in ("ledger", "sift_ledger", "shards"):
        assert {path.name for path in made(case).path.iterdir()} <= known
