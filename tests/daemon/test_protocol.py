import os
import pickle
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message

from fedllm_flwr import __version__, records
from fedllm_flwr.daemon import protocol
from fedllm_flwr.errors import DaemonError, WireError

Fixture = Callable[..., Any]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        yield one, other


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_frames_arrive_as_they_were_sent(
    content: bytes, ends: tuple[socket.socket, socket.socket]
) -> None:
    protocol.send(ends[0], content)
    protocol.send_json(ends[0], {"a": [1, "x"]})
    assert protocol.receive(ends[1], 3, "frame") == content
    assert protocol.receive_json(ends[1], "facts") == {"a": [1, "x"]}


def test_a_frame_that_is_too_large_is_refused_before_it_is_read(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ends[0].sendall(b"FLLM" + (2**60).to_bytes(8, "big"))
    with pytest.raises(
        DaemonError, match=r"^reply: expected at most 10 bytes, got 1152921504606846976$"
    ):
        protocol.receive(ends[1], 10, "reply")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\n", "expected a frame, got b'GET '"),
        (b"FLLM" + (9).to_bytes(8, "big") + b"half", "hung up after 4 of 9 bytes"),
        (b"", "hung up after 0 of 12 bytes"),
        (b"FLLM" + (4).to_bytes(8, "big") + b"[1]\n", "expected a JSON object"),
        (b"FLLM" + (4).to_bytes(8, "big") + b"\xff{}\n", "expected a JSON object"),
    ],
)
def test_what_is_no_frame_is_a_typed_error(
    sent: bytes, said: str, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[0].sendall(sent)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(DaemonError) as caught:
        protocol.receive_json(ends[1], "hello")
    assert said in str(caught.value)


def test_long_texts_are_cut_so_that_an_error_always_arrives(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    protocol.send_json(ends[0], {"text": "é" * 10**5})
    assert protocol.receive_json(ends[1], "outcome")["text"].startswith("éé")


def test_flowers_own_bytes_hold_a_message_and_a_context(message: Fixture, node: Fixture) -> None:
    """Fails when Flower moves or changes its private serialisation."""
    asked = message({"x": 1}, p=np.arange(5, dtype=np.float32))
    again = protocol.read_message(protocol.message_bytes(asked))
    assert again.metadata == asked.metadata
    body, parts = records.read(again, records.INSTRUCTION)
    assert body == {"x": 1}
    np.testing.assert_array_equal(parts["p"], np.arange(5))
    failed = Message(Error(2, "why"), reply_to=asked)
    assert protocol.read_message(protocol.message_bytes(failed)).error.reason == "why"
    context = node("socket", device="cpu", share=0.5, is_new=True)
    context.state["kept"] = ArrayRecord({"a": Array(np.eye(2, dtype=np.float32))})
    context.state["facts"] = ConfigRecord({"n": [1, 2], "s": "t"})
    back = protocol.read_context(protocol.context_bytes(context))
    assert (back.run_id, back.node_id, back.node_config, back.run_config) == (
        7,
        9,
        context.node_config,
        {"a": 1},
    )
    assert back.state == context.state


@pytest.mark.parametrize("content", [b"\xff\xff", b"nonsense", pickle.dumps({"a": print})])
def test_bytes_that_are_neither_are_typed_errors(content: bytes) -> None:
    for read in (protocol.read_context, protocol.read_message):
        with pytest.raises(DaemonError, match="does not decode"):
            read(content)


def test_errors_come_back_as_what_they_are_if_they_are_ours() -> None:
    for name, kind in protocol.ERRORS.items():
        back = protocol.rebuilt(protocol.error_facts(kind("no good")))
        assert (type(back), type(back).__name__, str(back)) == (kind, name, "no good")
    assert {"WireError", "DataError", "ConfigError", "DaemonError"} <= set(protocol.ERRORS)
    other = protocol.rebuilt(protocol.error_facts(ZeroDivisionError("by 0")))
    assert (type(other), str(other)) == (DaemonError, "ZeroDivisionError: by 0")
    assert type(protocol.rebuilt({"kind": "SystemExit"})) is DaemonError


def test_sides_that_run_the_same_do_not_differ() -> None:
    ours = protocol.identity()
    assert set(ours) == {*protocol.PACKAGES, "code"}
    assert ours["fedllm-flwr"] == __version__
    assert protocol.difference(ours, protocol.identity()) == ""


@pytest.mark.parametrize("theirs", [None, [], {}, {"code": "x"}])
def test_what_differs_is_named(theirs: Any) -> None:
    ours = {"code": "y"}
    assert protocol.difference(ours, theirs).startswith("code: the daemon runs y, the client ")


def test_the_digest_follows_the_code(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for text in ("a = 1", "a = 2"):
        root = tmp_path / text[-1]
        (root / "fedllm_flwr").mkdir(parents=True)
        (root / "fedllm_flwr" / "__init__.py").write_text(text)
        (root / "fedllm_flwr" / "notes.txt").write_text(text)
        monkeypatch.setattr(protocol.fedllm_flwr, "__file__", str(root / "fedllm_flwr" / "__init__.py"))  # fmt: skip
        found.add(protocol.identity()["code"])
    assert len(found) == 2


def test_the_kernel_says_who_is_at_the_other_end(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert protocol.peer_user(ends[0]) == os.getuid()
    protocol.check_peer(ends[0])
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(DaemonError, match=f"belongs to user {own}, expected {own + 1}"):
        protocol.check_peer(ends[0])


def test_wire_errors_keep_their_exit_code() -> None:
    assert protocol.rebuilt({"kind": "WireError", "text": "t"}).exit_code == WireError.exit_code
