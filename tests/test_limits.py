import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.core import run
from fedllm_flwr.errors import ConfigError, RunStoppedError, WireError
from fedllm_flwr.limits import (
    ERROR_TOO_LARGE,
    NODE_LIMIT,
    BoundedGrid,
    check_size,
    content_bytes,
    limit_of_node,
)

Fixture = Callable[..., Any]
FLOATS = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"


@pytest.fixture
def asked(edge_grid: Fixture) -> Callable[..., Message]:
    """A training message with an array of so many values."""
    edge_grid(1)

    def make(values: int) -> Message:
        content = records.instruction({"a": 1}, {"p": np.zeros(values, np.float32)}, "float32")
        return Message(content, 1000, records.TRAIN)

    return make


def test_content_is_counted_without_being_read(asked: Fixture, wire_bytes: Fixture) -> None:
    for values in (1, 1000, 10**6):
        message = asked(values)
        found = content_bytes(message)
        assert 4 * values < found < 4 * values + 500
        assert abs(len(wire_bytes(message)) - found) < 3000, "what Flower puts on the network"
    message = asked(1)
    before = content_bytes(message)
    message.content["more"] = ConfigRecord({"texts": ["x" * 50, "y"], "raw": b"z" * 7, "n": [1, 2]})
    assert content_bytes(message) - before == 50 + 1 + 7 + 16 + len("textsrawn")
    assert content_bytes(Message(RecordDict(), 1, "train")) == 0


def test_the_limit_is_the_last_size_that_passes(asked: Fixture) -> None:
    message = asked(1000)
    size = content_bytes(message) / 1e6
    check_size(message, size, "reply", "a.key")
    with pytest.raises(WireError, match=r"^reply: expected at most 0.00\d+ MB \(a.key\), got 0.00\d+ MB$"):  # fmt: skip
        check_size(message, size - 1e-6, "reply", "a.key")


def test_a_huge_instruction_is_refused_before_it_is_decoded(
    asked: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = asked(10**6)
    read: list[Any] = []
    monkeypatch.setattr(records, "read", lambda *given: read.append(given))
    monkeypatch.setattr(records, "read_body", lambda *given: read.append(given))
    facts: dict[str, Any] = {"partition-id": 0, "num-partitions": 1, NODE_LIMIT: 3.5}
    context = Context(run_id=1, node_id=1000, node_config=facts, state=RecordDict(), run_config={})
    with pytest.raises(
        WireError, match=r"^instruction: expected at most 3.5 MB \(max-message-mb of"
    ):
        app(message, context)
    assert read == []


HUGE = 500_000


def test_a_node_that_always_answers_with_a_huge_message_is_named_and_nothing_is_decoded(
    micro: Fixture, edge_grid: Fixture, spoil: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def huge(asked: Message, infos: Any, parts: dict[str, np.ndarray]) -> None:
        if "1/adapter" in parts:
            parts["1/adapter"] = np.zeros(HUGE, np.float32)

    decoded: list[int] = []
    whole = Array.numpy
    monkeypatch.setattr(Array, "numpy", lambda self: decoded.append(len(self.data)) or whole(self))
    config = micro("runtime.num_nodes=4", "runtime.max_message_mb=1.5", "num_rounds=2", "evaluate_every=2",
                   "strategy.min_fraction=0.5")  # fmt: skip
    grid = edge_grid(4, spoil(huge))
    run(grid, config, str(tmp_path / "run"))
    failures = _records(tmp_path / "run", "failure")
    assert [(f["round"], f["partition_id"]) for f in failures] == [(1, 1), (2, 1)]
    assert all(
        f["reason"]
        == f"error {ERROR_TOO_LARGE}: reply: expected at most 1.5 MB (runtime.max_message_mb), got 2 MB"
        for f in failures
    )
    assert decoded
    spoiled_itself = [size for size in decoded if size > 1.5e6]
    assert spoiled_itself == [], "the server never decodes it"


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    from fedllm_flwr.runs.directory import RunDirectory

    return RunDirectory.open(folder).records(kind)


def test_a_node_that_says_who_it_is_in_a_huge_message_is_no_node(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    def large(asked: list[Message], replies: list[Message]) -> list[Message]:
        for reply in replies:
            if reply.metadata.message_type == records.DESCRIBE:
                reply.content["more"] = ConfigRecord({"x": "y" * 10_000})
        return replies

    config = micro("runtime.max_message_mb=0.01", "runtime.node_wait_seconds=0.1")
    with pytest.raises(RunStoppedError, match="0 of unknown places are taken"):
        run(edge_grid(2, large), config, str(tmp_path / "run"))
    said = [line["text"] for line in _records(tmp_path / "run", "event")]
    assert any("expected at most 0.01 MB" in text for text in said)


def test_other_ways_to_the_grid_are_closed(edge_grid: Fixture) -> None:
    grid = BoundedGrid(edge_grid(3), 1.0)
    assert list(grid.get_node_ids()) == [1000, 1001, 1002]
    for call in (grid.push_messages, grid.pull_messages, grid.create_message):
        with pytest.raises(TypeError, match="BoundedGrid"):
            call([])


def header(text: bytes) -> bytes:
    """The start of a .npy file."""
    return b"\x93NUMPY\x01\x00v\x00" + text.ljust(117) + b"\n"


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    {
        "promises a petabyte": header(FLOATS % 2**50),
        "promises more than fits into an integer": header(FLOATS % 10**30),
        "promises less than nothing": header(FLOATS % -1),
        "a pickle": pickle.dumps([1.0, 2.0]),
        "an array of objects": header(FLOATS.replace(b"<f4", b"|O") % 1) + pickle.dumps([print]),
        "an archive": archive(),
        "a header that does not end": header(b"(((("),
        "nothing": b"",
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_bytes_that_are_no_plain_array_are_refused(data: tuple[str, bytes], asked: Fixture) -> None:
    message = asked(4)
    message.content[records.ARRAYS] = ArrayRecord(
        {records.FLAT: Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=data[1])}
    )
    with pytest.raises(WireError, match=r"does not decode|got an archive"):
        records.read(message, records.INSTRUCTION)


@pytest.mark.parametrize("value", ["10", True, 0, -1, float("nan"), None])
def test_a_limit_that_is_no_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="node config max-message-mb: expected a number above 0"):
        limit_of_node({NODE_LIMIT: value})
    assert limit_of_node({}) == 1024
    assert limit_of_node({NODE_LIMIT: 7}) == 7.0
