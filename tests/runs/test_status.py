import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.status import LOCK, run_status

MakeRun = Callable[..., RunDirectory]
HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def files(run: RunDirectory) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def test_a_finished_run_has_its_last_rounds_figures(make_run: MakeRun) -> None:
    run = make_run()
    (run.checkpoints / "round-0003").mkdir(parents=True)
    (run.checkpoints / "round-0004").mkdir()
    (run.checkpoints / ".tmp-1-x").mkdir()
    before = files(run)
    found = run_status(run)
    assert found.pop("seconds_since_last_record") >= 0
    assert found == {
        "run": str(run.path), "experiment": "r8_demo", "fingerprint": "0123456789abcdef", "state": "finished",
        "round": 4, "num_rounds": 4, "checkpoint": 4, "dropped_replies": 0, "accuracy": 0.9375, "loss": 1.0625,
        "validation_accuracy": 0.9075, "train_loss": 0.375, "worst_client_accuracy": 0.875,
    }  # fmt: skip
    assert files(run) == before


def test_a_run_that_gave_up_says_why_until_it_goes_on(make_run: MakeRun) -> None:
    run = make_run(rounds=2, finished=False)
    run.append({"kind": "failure", "round": 3, "partition_id": 1, "reason": "late"})
    run.append({"kind": "event", "text": "stopped: nodes: waited 5 s"})
    found = run_status(run)
    assert (found["state"], found["reason"]) == ("stopped", "nodes: waited 5 s")
    assert (found["round"], found["dropped_replies"]) == (2, 1)
    run.append({"kind": "started", "round": 3, "rounds": 4, "cohort_size": 8})
    found = run_status(run)
    assert found["state"] == "interrupted"
    assert "reason" not in found


def test_an_empty_run_was_interrupted_before_its_first_record(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    assert run_status(run) == {
        "run": str(run.path),
        "state": "interrupted",
        "round": 0,
        "dropped_replies": 0,
    }


@pytest.mark.parametrize("answers", [0, 3])
def test_a_run_that_somebody_writes_to_is_under_way(answers: int, make_run: MakeRun) -> None:
    run = make_run(rounds=1, finished=False)
    run.append({"kind": "started", "round": 2, "rounds": 4, "cohort_size": 8})
    for partition_id in range(answers):
        run.append({"kind": "client", "round": 2, "partition_id": partition_id})
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path / LOCK)], stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        found = run_status(run)
        assert found["state"] == "running"
        assert (found["round_under_way"], found["cohort_size"], found["answered"]) == (2, 8, answers)  # fmt: skip
    finally:
        holder.kill()
        holder.communicate()
    assert run_status(run)["state"] == "interrupted"


def test_asking_does_not_keep_a_writer_out(make_run: MakeRun) -> None:
    run = make_run(rounds=1, finished=False)
    with FileLock(run.path / LOCK):
        pass
    assert run_status(run)["state"] == "interrupted"
    with FileLock(run.path / LOCK, timeout=0):
        pass


def test_between_two_rounds_no_round_is_under_way(make_run: MakeRun) -> None:
    run = make_run(rounds=None, finished=False)
    run.append({"kind": "started", "round": 1, "rounds": 4, "cohort_size": 2})
    run.append({"kind": "round", "round": 1, "rounds": 4})
    with FileLock(run.path / LOCK):
        found = run_status(run)
    assert found["round"] == 1
    assert "round_under_way" not in found
