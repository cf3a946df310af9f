"""Every part of a real federation dies by kill -9 and comes back; each test says what counts as nothing lost."""

import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = (
    "experiment=smoke", "baselines=none", "partition=iid", "partition.num_clients=3", "task.train_rows=24",
    "task.validation_rows=6", "task.test_rows=9", "client.local_epochs=0", "client.local_steps=1",
    "client.batch_size=4", "runtime.device=cpu", "runtime.dtype=float32", "runtime.node_wait_seconds=1200",
    "num_rounds=3", "evaluate_every=3",
)  # fmt: skip
ALL = ("strategy.min_fraction=1", "strategy.max_retries=4")
"""A round is done when every client's answer counts: whoever failed is asked again."""
SHORT = ("strategy.round_timeout_seconds=150",)
KILLS = 10
SEED = 7


def told(submitted: Any) -> tuple[str, list[int], list[tuple[Any, ...]]]:
    """What no death may change: the final hash, the rounds, and each client's figures in each of them."""
    run = submitted.ended()
    figures = sorted(
        (c["round"], c["partition_id"], c["loss"], c["num_examples"]) for c in run.records("client")
    )
    return run.summary()["adapter_sha256"], [r["round"] for r in run.records("round")], figures


@dataclass
class Undisturbed:
    """What a run of ``SMALL`` and ``ALL`` leaves when nothing dies, and how long its ServerApp lives."""

    told: tuple[str, list[int], list[tuple[Any, ...]]]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(federation: Any, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    submitted = federation.run(tmp_path_factory.mktemp("undisturbed") / "run", *SMALL, *ALL)
    submitted.until("a ServerApp", federation.server_app)
    began = time.monotonic()
    submitted.until("the summary", lambda: (submitted.out_dir / "summary.json").exists())
    seconds = time.monotonic() - began
    found = told(submitted)
    assert found[1] == [0, 1, 2, 3]
    assert [(n, p) for n, p, *_ in found[2]] == [(n, p) for n in (1, 2, 3) for p in range(3)]
    return Undisturbed(found, seconds)


def until_trained(federation: Any, submitted: Any, server_round: int, place: int) -> None:
    """Wait until a node has got its message of a round."""
    heard = f"ROUND train-{server_round:06d}"
    before = federation.log(f"node-{place}").read_text().count(heard)
    submitted.until_round(server_round)
    submitted.until(
        f"node {place} to be asked in round {server_round}",
        lambda: federation.log(f"node-{place}").read_text().count(heard) > before,
    )


def test_two_of_three_nodes_die_and_the_run_waits_for_them(
    federation: Any, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Nothing lost: the round in which they died is whole in the end, with the bits of a run in which nobody did."""
    submitted = federation.run(tmp_path / "run", *SMALL, *ALL)
    until_trained(federation, submitted, 2, 1)
    federation.kill("node-1", "node-2")
    submitted.until("both to be missed", lambda: submitted.failed(2) == {1, 2})
    time.sleep(5)
    assert submitted.process.poll() is None, submitted.said()
    assert [r["round"] for r in submitted.records("round")] == [0, 1], "it waits"
    for place in (1, 2):
        federation.start_node(place)
    assert told(submitted) == undisturbed.told
    assert {f["partition_id"] for f in submitted.records("failure")} == {1, 2}


def test_a_node_dies_in_a_round_and_comes_back(federation: Any, tmp_path: Path) -> None:
    """Nothing lost but the dead node's answer of that round, which the records name; later rounds have it again."""
    submitted = federation.run(tmp_path / "run", *SMALL)
    until_trained(federation, submitted, 2, 1)
    federation.kill("node-1")
    submitted.until("it to be missed", lambda: submitted.failed(2))
    federation.start_node(1)
    _, rounds, figures = told(submitted)
    assert rounds == [0, 1, 2, 3]
    assert [p for n, p, *_ in figures if n == 2] == [0, 2]
    assert [p for n, p, *_ in figures if n == 3] == [0, 1, 2]
    assert [(f["round"], f["partition_id"]) for f in submitted.records("failure")] == [(2, 1)]
    assert submitted.records("round")[2]["dropped_replies"] == 1


def test_the_superlink_dies_and_then_its_whole_machine(
    federation: Any, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Nothing lost: finished rounds stay as they are, and a resume ends with the bits of a run in which nothing died.

    The run goes on over the SuperLink's database by itself, except if the ServerApp was just sending: then Flower gives
    up, and the run stops with its last checkpoint. Answers on their way are asked for again after the deadline.
    """
    submitted = federation.run(tmp_path / "run", *SMALL, *ALL, *SHORT)
    until_trained(federation, submitted, 2, 0)
    before = [c for c in submitted.records("client") if c["round"] == 1]
    assert [c["partition_id"] for c in before] == [0, 1, 2]
    federation.kill("superlink")
    federation.start_superlink()
    gone_on = lambda: any(r["round"] == 3 for r in submitted.records("started"))  # noqa: E731
    federation.until(
        "it to go on, or to stop", lambda: gone_on() or submitted.process.poll() is not None
    )
    if not gone_on():
        assert "fedllm action=resume" in submitted.said(), submitted.said()
    submitted.kill()
    federation.kill("superexec", "superlink")
    federation.start_superlink()
    federation.start_superexec()
    again = federation.resume(tmp_path / "run")
    assert told(again) == undisturbed.told
    assert [c for c in again.records("client") if c["round"] == 1] == before
    assert again.ended().summary()["resumed_rounds"] >= 1
    assert len(federation.runs()) >= 2, "the database knows the runs of before"


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_ten_kills_of_the_server_app_at_random_moments_change_nothing(
    federation: Any, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Nothing lost: hash, rounds and figures are those of a run in which nothing died."""
    moments = random.Random(SEED)
    place, killed, resumed = tmp_path / "run", 0, set()
    begun, submitted = federation.begun(), federation.run(place, *SMALL, *ALL)
    while killed < KILLS:
        submitted.until("a ServerApp", lambda n=begun: federation.begun() > n)
        app = submitted.until("its process", federation.server_app)
        gone = time.monotonic() + moments.uniform(0, undisturbed.seconds / 2)
        while time.monotonic() < gone and is_alive(app):
            time.sleep(0.05)
        if (place / "summary.json").exists():
            assert told(submitted) == undisturbed.told, f"after {killed} kills"
            resumed.add(submitted.ended().summary()["resumed_rounds"])
            shutil.rmtree(place)
            begun, submitted = federation.begun(), federation.run(place, *SMALL, *ALL)
            continue
        assert is_alive(app), submitted.said()
        app.kill()
        submitted.kill()
        killed += 1
        begun, is_there = federation.begun(), (place / "manifest.json").exists()
        submitted = federation.resume(place) if is_there else federation.run(place, *SMALL, *ALL)
    assert told(submitted) == undisturbed.told
    resumed.add(submitted.ended().summary()["resumed_rounds"])
    assert resumed - {0}, "no kill fell into the rounds"


REASONS = {
    1: "expected finite values, got nan",
    2: "got 7167",
    3: "got 14336",
    4: "expected at most 5 MB",
    5: "no reply before the deadline",
}


@pytest.fixture
def released(federation: Any) -> Iterator[Path]:
    """Node 1 is the odd one meanwhile; the file with which it answers late."""
    socket = federation.folder / "odd" / "socket"
    program = str(Path(__file__).with_name("odd_node.py"))
    federation.serve_messages("odd", ["python", program, str(socket)], socket)
    federation.kill("node-1")
    federation.start_node(1, asks=socket)
    yield socket.with_name("released")
    federation.kill("node-1", "odd")
    federation.start_node(1)


def test_a_node_that_always_answers_wrongly_is_named_in_every_round(
    federation: Any, released: Path, tmp_path: Path
) -> None:
    """Nothing lost but its own answers: NaN, a wrong shape, a wrong rank, a huge message, one after the deadline."""
    submitted = federation.run(
        tmp_path / "run", *SMALL, "num_rounds=5", "evaluate_every=5", "runtime.max_message_mb=5",
        *SHORT,
    )  # fmt: skip
    submitted.until("the last answer to be missed", lambda: submitted.failed(5))
    released.touch()
    _, rounds, figures = told(submitted)
    assert rounds == [0, 1, 2, 3, 4, 5]
    assert [(n, p) for n, p, *_ in figures] == [(n, p) for n in range(1, 6) for p in (0, 2)]
    failures = submitted.records("failure")
    assert [(f["round"], f["partition_id"]) for f in failures] == [(n, 1) for n in range(1, 6)]
    for failure in failures:
        assert REASONS[failure["round"]] in failure["reason"], failure
    assert all(math.isfinite(r["train_loss"]) for r in submitted.records("round")[1:])
    assert math.isfinite(submitted.ended().summary()["loss"])
