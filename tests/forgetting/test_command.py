import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from strategies.observer import MERGING

Fixture = Callable[..., Any]


@pytest.fixture
def unlearn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., RunDirectory]:
    """The command, into a folder of the test's own."""

    def done(source: RunDirectory, client: int, *more: str, name: str = "") -> RunDirectory:
        out_dir = tmp_path / (name or f"without_{client}")
        command = ["action=unlearn", f"run={source.path}", f"client={client}", f"out_dir={out_dir}", *more]  # fmt: skip
        assert actions.act(compose_run(command), command) == 0
        return RunDirectory.open(out_dir)

    return done


def last(run: RunDirectory) -> checkpoints.Checkpoint:
    found = checkpoints.latest(run.checkpoints)
    assert found is not None
    return found


def adapter_files(run: RunDirectory) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run.path / "adapter").glob("*.safetensors")}


def same_model(found: RunDirectory, expected: RunDirectory) -> None:
    """Checkpoint and export have the same bytes."""
    ours, theirs = last(found), last(expected)
    assert ours.server_round == theirs.server_round
    assert sorted(ours.arrays) == sorted(theirs.arrays)
    for name, values in theirs.arrays.items():
        assert ours.arrays[name].tobytes() == values.tobytes(), name
    assert adapter_files(found) == adapter_files(expected)
    assert adapter_files(found), "there is something to compare"
    assert found.summary()["adapter_sha256"] == expected.summary()["adapter_sha256"]


CASES = [
    ("ledger", 4, "rewind", 1),
    ("ledger", 0, "rewind", 2),
    ("ledger", 3, "rewind", 3),
    ("adam", 0, "rewind", 2),
    ("ledger", 0, "retrain", 1),
    ("sift", 2, "exact_merge", 1),
    ("sift_ledger", 2, "exact_merge", 1),
    ("shards", 4, "shards", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "client", "method", "first"), CASES)
def test_an_exact_method_gives_the_bytes_of_a_run_without_the_client(
    case: str,
    client: int,
    method: str,
    first: int,
    made: Fixture,
    unlearn: Fixture,
    contents: Fixture,
) -> None:
    source = made(case)
    before = contents(source.path)
    found = unlearn(source, client, f"method={method}")
    same_model(found, made(case, f"unlearning.removed=[{client}]"))
    assert found.summary()["adapter_sha256"] != source.summary()["adapter_sha256"]
    assert contents(source.path) == before, "the run itself is not touched"
    trained = {r["round"] for r in found.records("client")}
    assert trained == ({1, 2, 3} if case in ("ledger", "adam", "shards") else set())
    summary = found.summary()
    assert (summary["removed_clients"], summary["removal"]) == (str(client), method)
    assert summary["exactness"] == "exact"
    if method == "rewind":
        assert summary["resumed_rounds"] == first - 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["merge", "replay"])
def test_an_approximate_method_says_so_and_is_not_the_run_without_the_client(
    method: str, made: Fixture, unlearn: Fixture
) -> None:
    source, expected = made("ledger"), made("ledger", "unlearning.removed=[0]")
    found = unlearn(source, 0, f"method={method}")
    shas = {r.summary()["adapter_sha256"] for r in (source, expected, found)}
    assert len(shas) == 3
    assert found.summary()["exactness"] == "approximate"
    assert found.manifest["config"]["unlearning"]["exactness"] == "approximate"
    certificate = json.loads((found.path / "certificate.json").read_text())
    assert (certificate["method"], certificate["exactness"]) == (method, "approximate")
    assert "loss" in found.summary(), "a model that no round has made is measured all the same"
    assert any("which is approximate" in e["text"] for e in found.records("event"))
    assert 0 not in {p for r in found.records("round") for p in r.get("cohort", ())}


@pytest.mark.slow
def test_a_removal_from_a_removal_equals_a_run_without_both(
    made: Fixture, unlearn: Fixture
) -> None:
    first = unlearn(made("ledger"), 3, "method=rewind")
    both = unlearn(first, 0, "method=rewind")
    same_model(both, made("ledger", "unlearning.removed=[0,3]"))


@pytest.mark.slow
def test_a_chain_of_exact_merges_in_any_order_equals_a_run_without_them(
    made: Fixture, unlearn: Fixture
) -> None:
    one = unlearn(unlearn(made("sift"), 5), 1)
    other = unlearn(unlearn(made("sift"), 1, name="first"), 5, name="second")
    same_model(one, other)
    same_model(one, made("sift", "unlearning.removed=[1,5]"))
    arrays = last(one).arrays
    assert f"{MERGING}mask/1" not in arrays
    assert f"{MERGING}mask/0" in arrays


@pytest.mark.slow
def test_a_removal_that_was_killed_goes_on_with_the_same_command(
    made: Fixture, unlearn: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the new run began, and again in the middle of it."""
    source = made("ledger")
    carry = actions.run_experiment

    def killed(*_: Any) -> None:
        raise RunStoppedError("killed")

    monkeypatch.setattr(actions, "run_experiment", killed)
    with pytest.raises(RunStoppedError):
        unlearn(source, 4)
    prepared = RunDirectory.open(tmp_path / "without_4")
    assert not prepared.is_finished
    monkeypatch.setattr(actions, "run_experiment", carry)
    found = unlearn(source, 4)
    (found.path / "summary.json").unlink()
    shutil.rmtree(found.checkpoints / "round-0003")
    shutil.rmtree(found.path / "adapter")
    same_model(unlearn(source, 4), made("ledger", "unlearning.removed=[4]"))
    assert [p.name for p in tmp_path.iterdir()] == ["without_4"], "no leftovers"


def test_without_an_out_dir_the_new_run_lies_beside_the_old_one(
    copied: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied("sift")
    command = ["action=unlearn", f"run={source.path}", "client=0"]
    assert actions.act(compose_run(command), command) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Removal of client 0 from sift\n")
    assert re.search(r"Method: `exact_merge`, exact: the same bytes", out)
    assert (source.path.parent / "unlearn_sift_exact_merge_client0" / "certificate.md").exists()
