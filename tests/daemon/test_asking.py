import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message

from fedllm_flwr import records
from fedllm_flwr.daemon import asking, protocol
from fedllm_flwr.errors import DaemonError, WireError
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE, FORGET_VARIABLE, STATE_PATH_VARIABLE

Fixture = Callable[..., Any]


def doubling(message: Message, context: Context) -> Message:
    """What a client might do: read the parts, count in the state, answer."""
    body, parts = records.read(message, records.INSTRUCTION)
    before = context.state.get("count")
    context.state["count"] = ConfigRecord({"n": 1 + (before["n"] if before else 0)})  # type: ignore[index,operator]
    if body.get("fail"):
        raise {"ours": WireError("not like this"), "other": KeyError("k")}[body["fail"]]
    doubled = {name: 2 * values for name, values in parts.items()}
    return Message(
        records.answer({"facts": dict(context.node_config)}, doubled, "float32", 3),
        reply_to=message,
    )


def test_a_node_without_a_daemon_does_the_work_itself(message: Fixture, node: Fixture) -> None:
    assert asking.ask(message(), node("")) is None


def test_the_daemon_answers_and_its_state_comes_back(
    message: Fixture, node: Fixture, serving: Fixture
) -> None:
    context = node(serving(doubling))
    context.state["kept"] = ArrayRecord({"a": Array(np.eye(2))})
    values = np.linspace(0, 1, 10**6, dtype=np.float32)
    for n in (1, 2):
        asked = message({}, p=values)
        reply = asking.ask(asked, context)
        assert reply is not None
        here = doubling(asked, node(""))
        _, parts = records.read(reply, records.ANSWER)
        np.testing.assert_array_equal(parts["p"], 2 * values)
        for name in (
            "run_id",
            "src_node_id",
            "dst_node_id",
            "reply_to_message_id",
            "group_id",
            "message_type",
        ):
            assert getattr(reply.metadata, name) == getattr(here.metadata, name), name
        assert context.state["count"]["n"] == n  # type: ignore[index]
        np.testing.assert_array_equal(context.state["kept"]["a"].numpy(), np.eye(2))  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [("ours", WireError, "^not like this$"), ("other", DaemonError, "^KeyError: 'k'$")],
)
def test_errors_and_the_state_that_they_leave_come_back(
    fail: str, kind: type, said: str, message: Fixture, node: Fixture, serving: Fixture
) -> None:
    context = node(serving(doubling))
    with pytest.raises(kind, match=said):
        asking.ask(message({"fail": fail}), context)
    assert context.state["count"]["n"] == 1, "as in a deployment without a daemon"  # type: ignore[index]


def test_a_daemon_that_is_not_there_is_warned_of(
    short_folder: Path, message: Fixture, node: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert asking.ask(message(), node(short_folder / "none")) is None
    assert caplog.messages == [
        f"daemon-socket {short_folder / 'none'}: no daemon answers (No such file or directory); this process does the "
        "work itself"
    ]


def test_a_daemon_with_other_code_is_warned_of_and_not_asked(
    message: Fixture, node: Fixture, serving: Fixture, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Message] = []
    path = serving(lambda m, _: asked.append(m))
    other = protocol.identity() | {"fedllm-flwr": "9.9.9"}
    monkeypatch.setattr(protocol, "identity", lambda: other)
    with caplog.at_level(logging.WARNING):
        assert asking.ask(message(), node(path)) is None
    assert asked == []
    assert (
        "fedllm-flwr: the daemon runs 0.1.0, the client 9.9.9; this process does the work itself"
        in caplog.text
    )


def test_a_message_that_is_too_large_is_refused_before_it_is_sent(
    message: Fixture, node: Fixture, serving: Fixture
) -> None:
    path = serving(doubling, limit_bytes=2000)
    with pytest.raises(DaemonError, match=r"message: expected at most 2000 bytes, got 4\d\d\d"):
        asking.ask(message({}, p=np.zeros(1000, np.float32)), node(path))
    assert asking.ask(message({}, p=np.zeros(10, np.float32)), node(path)) is not None


def test_a_socket_of_somebody_else_is_an_error(
    message: Fixture, node: Fixture, serving: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = serving(doubling)
    own = os.getuid()
    monkeypatch.setattr(protocol, "peer_user", lambda _: own + 1)
    with pytest.raises(DaemonError, match=f"belongs to user {own + 1}, expected {own}"):
        asking.ask(message(), node(path))


def test_places_are_the_client_processs_own(
    message: Fixture, node: Fixture, serving: Fixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """A relative path, and a variable that only one of both processes has, mean what they mean to the client."""
    monkeypatch.setenv(STATE_PATH_VARIABLE, "/srv/state")
    monkeypatch.setenv(FORGET_VARIABLE, "3,5")
    monkeypatch.delenv(DATA_PATH_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    reply = asking.ask(message(), node(serving(doubling), model_path="model", device="cpu"))
    assert reply is not None
    facts = records.read(reply, records.ANSWER)[0]["facts"]
    assert facts["model-path"] == str(tmp_path / "model")
    assert facts["forget"] == "3,5"
    assert (facts["state-path"], facts["data-path"], facts["device"]) == ("/srv/state", "", "cpu")
