import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.follow import Follower
from fedllm_flwr.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {"experiment": "x"})


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What has been shown since the last call; standard output stays empty."""

    def lines() -> list[str]:
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    return lines


ROUND: dict[str, Any] = {"kind": "round", "round": 1, "rounds": 2, "accuracy": 0.5, "seconds": 3.0}


def test_new_records_are_shown_once_and_in_order(
    run: RunDirectory, shown: Callable[[], list[str]]
) -> None:
    with Follower(run.path) as follower:
        follower.look()
        run.append({"kind": "started", "round": 1, "rounds": 2, "cohort_size": 2})
        run.append({"kind": "client", "round": 1, "partition_id": 0})
        follower.look()
        assert shown() == ["round 1 of 2: 2 clients asked"]
        run.append({"kind": "failure", "round": 1, "partition_id": 1, "reason": "no reply"})
        run.append({"kind": "client", "round": 1, "partition_id": 3})
        run.append({"kind": "evaluation", "round": 1, "partition_id": 3})
        run.append(ROUND)
        follower.look()
        assert shown() == [
            "round 1: client 1 is left out: no reply",
            "round 1 of 2: 2 of 2 clients answered",
            "round 1 of 2: accuracy 0.500  up 0 B down 0 B  took 3 s  about 3 s left",
        ]
        follower.look()
        follower.finished({"accuracy": 0.75, "seconds": 6.0})
        assert shown() == ["finished: accuracy 0.750  in 6 s"]


def test_a_run_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, shown: Callable[[], list[str]]
) -> None:
    with Follower(tmp_path / "later") as follower:
        follower.look()
        run = RunDirectory.create(tmp_path / "later", {})
        run.append({"kind": "event", "text": "hello"})
        follower.look()
    assert shown() == ["hello"]


def test_a_line_that_is_being_written_is_shown_when_it_is_whole(
    run: RunDirectory, shown: Callable[[], list[str]]
) -> None:
    whole = json.dumps({"kind": "event", "text": "one line"}).encode() + b"\n"
    with Follower(run.path) as follower:
        (run.path / "metrics.jsonl").write_bytes(whole[:12])
        follower.look()
        assert shown() == []
        with (run.path / "metrics.jsonl").open("ab") as metrics:
            metrics.write(whole[12:])
        follower.look()
    assert shown() == ["one line"]


def test_what_was_there_before_is_not_shown_again(
    run: RunDirectory, shown: Callable[[], list[str]]
) -> None:
    run.append({"kind": "event", "text": "stopped: too few"})
    with Follower(run.path) as follower:
        follower.look()
        assert not follower.has_stopped, "that was an earlier attempt"
        run.append({"kind": "event", "text": "stopped: again"})
        follower.look()
        assert follower.has_stopped
    assert shown() == ["stopped: again"]


@pytest.mark.parametrize("written_before_the_look", [1, 40])
def test_a_resumed_run_replaces_its_file_and_is_followed_from_there(
    written_before_the_look: int, run: RunDirectory, shown: Callable[[], list[str]]
) -> None:
    for server_round in range(3):
        run.append(ROUND | {"round": server_round})
    with Follower(run.path) as follower:
        follower.look()
        run.truncate_after(0)
        for number in range(written_before_the_look):
            run.append({"kind": "event", "text": f"early {number}"})
        follower.look()
        shown()
        run.append({"kind": "event", "text": "late"})
        follower.look()
        assert shown() == ["late"]
