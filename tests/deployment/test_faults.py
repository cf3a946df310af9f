"""What real networks, disks and machines do to a run, by loopback: nothing is lost and the run ends well."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm_flwr import records
from fedllm_flwr.core import run
from fedllm_flwr.errors import DataError, RunStoppedError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE

Fixture = Callable[..., Any]
VICTIM = "1/adapter"
HUGE_VALUES = 8_000_000


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond this many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def always(spoil: Fixture, change: Callable[[dict[str, np.ndarray]], None]) -> Any:
    """Change one client's parts in every round."""

    def spoiled(asked: Message, infos: Any, parts: dict[str, np.ndarray]) -> None:
        if VICTIM in parts:
            change(parts)

    return spoil(spoiled)


def not_finite(parts: dict[str, np.ndarray]) -> None:
    parts[VICTIM][3] = np.nan


def wrong_rank(parts: dict[str, np.ndarray]) -> None:
    parts[VICTIM] = np.concatenate([parts[VICTIM], parts[VICTIM]])


def huge(parts: dict[str, np.ndarray]) -> None:
    parts[VICTIM] = np.zeros(HUGE_VALUES, np.float32)


FAULTS = {"NaN": not_finite, "twice the rank": wrong_rank, "32 MB": huge}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_node_that_is_always_wrong_is_named_in_every_round_and_the_run_ends(
    fault: str, micro: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    config = micro("runtime.num_nodes=4")
    played = play(config, grid=edge_grid(4, always(spoil, FAULTS[fault])))
    failures = [(f["round"], f["partition_id"]) for f in played.run.records("failure")]
    assert failures == [(n, 1) for n in (1, 2, 3)]
    assert all("\n" not in f["reason"] and len(f["reason"]) < 300 for f in played.run.records("failure"))  # fmt: skip
    assert [r["dropped_replies"] for r in played.run.records("round")[1:]] == [1, 1, 1]
    assert all(np.isfinite(v).all() for v in played.effects.values())


def test_a_node_that_answers_after_the_deadline_counts_for_nothing(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    def late(asked: list[Message], replies: list[Message]) -> list[Message]:
        """Flower hands out what has arrived, without a word for the rest."""
        of_victim = [1 in records.read_body(m).get("partition-ids", []) for m in asked]
        return [reply for reply, is_late in zip(replies, of_victim, strict=True) if not is_late]

    played = play(micro("runtime.num_nodes=4"), grid=edge_grid(4, late))
    reasons = {f["reason"] for f in played.run.records("failure")}
    assert {f["partition_id"] for f in played.run.records("failure")} == {1}
    assert all("no reply" in reason for reason in reasons)
    assert played.run.records("round")[-1]["round"] == 3


@pytest.fixture(scope="module")
def leaving_grid(edge_grid: Fixture) -> Fixture:
    """Nodes of which one is gone for good once a number of training messages have been sent."""

    class Leaving(edge_grid):  # type: ignore[misc, valid-type]
        def __init__(self, gone: int, after: int) -> None:
            super().__init__(4)
            self.gone, self.after = gone, after

        def get_node_ids(self) -> list[int]:
            trained = sum(m.metadata.message_type == records.TRAIN for m in self.sent)
            here = super().get_node_ids()
            return [n for n in here if n != self.gone] if trained >= self.after else here

    return Leaving


@pytest.mark.parametrize("method", ["fedlora", "fedprompt", "fedresprompt", "fedgrass"])
def test_a_node_that_leaves_for_good_is_waited_for_once_and_its_clients_are_named(
    method: str, micro: Fixture, play: Fixture, leaving_grid: Fixture
) -> None:
    config = micro("runtime.num_nodes=4", "runtime.node_wait_seconds=0.5", f"method={method}")
    played = play(config, grid=leaving_grid(1001, 4), splits=("test",))
    failures = played.run.records("failure")
    assert {(f["round"], f["partition_id"]) for f in failures} == {(2, 1), (3, 1)}
    assert all("its node is not there" in f["reason"] for f in failures)
    assert [e["text"] for e in played.run.records("event")] == [
        "nodes: waited 0.5 s for partition-id [1]; the run goes on without clients 1"
    ]
    assert [r["round"] for r in played.run.records("round")] == [0, 1, 2, 3]


def test_a_node_whose_clients_are_needed_stops_the_run_and_a_resume_needs_no_more_than_a_round(
    tmp_path: Path, smoke: Fixture, leaving_grid: Fixture
) -> None:
    config = replace(
        small(tmp_path / "run", smoke), runtime=smoke("runtime.node_wait_seconds=0.5").runtime
    )
    for leaver, fraction, ends in ((1000, 1.0, False), (1000, 0.5, True)):
        needing = replace(config, strategy=replace(config.strategy, min_fraction=fraction))
        place = tmp_path / f"{fraction}"
        grid = leaving_grid(leaver, 2)
        grid.contexts = {n: c for n, c in grid.contexts.items() if n < 1002}
        for context in grid.contexts.values():
            context.node_config["num-partitions"] = 2
        if ends:
            assert run(grid, needing, place)["dropped_replies"] > 0
        else:
            with pytest.raises(
                RunStoppedError, match=r"1 of 2 places are taken, missing partition-id \[0\]"
            ):
                run(grid, needing, place)
            with pytest.raises(RunStoppedError, match="missing"):
                run(grid, needing, place)


def small(out_dir: Path, compose: Fixture) -> Any:
    """A whole run, whose checkpoints are larger than its other files."""
    return compose("method.rank=16", "method.target_modules=[q_proj,v_proj]", "partition.num_clients=2",
                   "partition=iid", "task.train_rows=16", "task.test_rows=8", "task.validation_rows=4",
                   "client.local_epochs=0", "client.local_steps=1", "num_rounds=2", "baselines=none",
                   "runtime.cohort_tokens=0", f"out_dir={out_dir}")  # fmt: skip


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    tmp_path: Path, smoke: Fixture, edge_grid: Fixture
) -> None:
    whole = run(edge_grid(2), small(tmp_path / "whole", smoke), tmp_path / "whole")
    config = small(tmp_path / "run", smoke)
    arrays = tmp_path / "whole" / "checkpoints" / "round-0001" / "arrays.safetensors"
    with (
        files_of_at_most(arrays.stat().st_size - 1),
        pytest.raises(RunStoppedError, match=r"checkpoint round-000\d: expected to write .* too large"),
    ):  # fmt: skip
        run(edge_grid(2), config, tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    assert [p.name for p in directory.checkpoints.iterdir()] == ["round-0000"], "nothing in halves"
    assert "stopped: checkpoint" in directory.records("event")[-1]["text"]
    assert run(edge_grid(2), config, tmp_path / "run")["adapter_sha256"] == whole["adapter_sha256"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:  # fmt: skip
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.deployment
@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_file_stops_the_run_and_loses_nothing(
    tmp_path: Path, small_disk: Path, smoke: Fixture, edge_grid: Fixture
) -> None:
    """The disk has room for ever more of a run: its records, then its checkpoints, then its report."""
    whole = run(edge_grid(2), small(tmp_path / "whole", smoke), tmp_path / "whole")
    config, place = small(small_disk / "run", smoke), small_disk / "run"
    reasons = set()
    for room in (24_576, 65_536, 131_072, 262_144, 393_216):
        facts = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(b"x" * (facts.f_bavail * facts.f_frsize - room))
        try:
            run(edge_grid(2), config, place)
        except RunStoppedError as error:
            reasons.add(str(error).partition(":")[0])
        (small_disk / "filler").unlink()
        assert run(edge_grid(2), config, place)["adapter_sha256"] == whole["adapter_sha256"]
        shutil.rmtree(place)
    assert len(reasons) >= 2, "the disk was full at different files"


@pytest.mark.parametrize("file", ["arrays.safetensors", "state.json", "sha256"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(
    file: str, damage: str, tmp_path: Path, micro: Fixture, play: Fixture
) -> None:
    config = micro("keep_checkpoints=9")
    whole = play(config, folder=tmp_path / "run")
    path = whole.run.checkpoints / "round-0003" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = play(config, folder=tmp_path / "run")
    assert again.sha == whole.sha
    assert [r["round"] for r in again.run.records("round")] == [0, 1, 2, 3]


def test_a_run_cannot_name_a_path_on_a_node(
    tmp_path: Path, micro: Fixture, play: Fixture, edge_grid: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A server that writes paths into its messages: the nodes read their own files all the same."""
    from fedllm_flwr.client_app import app

    own, foreign = tmp_path / "own.csv", tmp_path / "foreign.csv"
    for path, word in ((own, "own"), (foreign, "foreign")):
        path.write_text("text,label\n" + "".join(f"{word} {n},{'ab'[n % 2]}\n" for n in range(40)))
    seen: list[str] = []

    def node(message: Message, context: Any) -> Message:
        if message.has_content() and "instruction" in message.content:
            record = message.content["instruction"]
            if '"runtime"' in str(record["body"]):
                body = str(record["body"])
                named = ", ".join(f'"{name}": "{foreign}"' for name in ("data_path", "model_path"))
                record["body"] = body.replace('"runtime": {', f'"runtime": {{{named}, ')
                seen.append(str(record["body"]))
        return app(message, context)

    grid = edge_grid(2, client_app=node, node_config={"data-path": str(own)})
    opened: list[str] = []
    monkeypatch.setattr(Path, "read_bytes", _watched(opened))
    played = play(micro("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0", "partition=iid",
                        "num_rounds=1", "evaluate_every=1"), grid=grid)  # fmt: skip
    assert played.run.records("failure") == []
    assert any(str(foreign) in body for body in seen), "the message did name it"
    assert str(own) in opened
    assert str(foreign) not in opened


def _watched(opened: list[str]) -> Callable[[Path], bytes]:
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        opened.append(str(path))
        return read(path)

    return read_bytes


def test_without_a_file_of_its_own_a_node_refuses(
    micro: Fixture, play: Fixture, edge_grid: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_PATH_VARIABLE, raising=False)
    grid = edge_grid(2, node_config={"data-path": "/nowhere/secret-name.csv"})
    config = micro("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
                   "partition=iid", "num_rounds=1")  # fmt: skip
    with pytest.raises((RunStoppedError, DataError)) as caught:
        play(config, grid=grid)
    assert "secret-name" not in str(caught.value)
    assert all("secret-name" not in str(reply) for reply in grid.replies)


def test_sites_have_a_file_and_a_client_each(
    tmp_path: Path, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    """With ``partition=site`` a client trains on all training rows of its node's file."""
    lines = "".join(f"row {n},{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "own.csv").write_text("text,label\n" + lines)
    sites = ("task=csv", "task.labels=[a,b]", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
             "partition=site", "partition.num_clients=2", "partition.min_train_rows=1", "runtime=deployment",
             "num_rounds=1", "client.local_steps=0", "client.local_epochs=1")  # fmt: skip
    facts = {"data-path": str(tmp_path / "own.csv")}
    played = play(micro(*sites), grid=edge_grid(2, node_config=facts))
    assert [c["num_examples"] for c in played.run.records("client")] == [32, 32]
    crowded = edge_grid(1, node_config=facts)
    with pytest.raises(RunStoppedError):
        play(micro(*sites), grid=crowded)
    assert "expected one client for each of the 1 nodes, got 2" in str(crowded.replies[-1])
