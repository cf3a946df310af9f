import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedllm_flwr import records
from fedllm_flwr.daemon import asking, protocol, service
from fedllm_flwr.daemon.service import Daemon, listening
from fedllm_flwr.errors import ConfigError, DaemonError

Fixture = Callable[..., Any]


def echo(message: Message, context: Context) -> Message:
    return Message(records.answer({}, {}, "float32", 1), reply_to=message)


def test_nobody_else_can_open_the_socket(short_folder: Path) -> None:
    path = short_folder / "new" / "socket"
    before = os.umask(0)
    try:
        with listening(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert os.umask(0) == 0, "the process's own mask is back"
    finally:
        os.umask(before)
    assert not path.exists(), "the place is free again"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_folder_that_others_can_write_to_is_refused(mode: int, short_folder: Path) -> None:
    folder = short_folder / "open"
    folder.mkdir()
    folder.chmod(mode)
    with (
        pytest.raises(
            ConfigError, match=f"only this user can write to, got one of .* mode {mode:o}"
        ),
        listening(folder / "s"),
    ):
        pass
    assert list(folder.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with (
        pytest.raises(ConfigError, match=f"expected a folder of user {own + 1}"),
        listening(short_folder / "s"),
    ):
        pass


def test_there_is_one_daemon_at_a_place_and_a_dead_ones_socket_is_replaced(
    short_folder: Path,
) -> None:
    path = short_folder / "socket"
    with listening(path):
        with pytest.raises(ConfigError, match="another daemon listens there"), listening(path):
            pass
        assert path.exists(), "the refused one has removed nothing"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with listening(path) as server:
        assert server.getsockname() == str(path)


def test_a_file_in_the_way_stays(short_folder: Path) -> None:
    path = short_folder / "socket"
    path.write_text("mine")
    with (
        pytest.raises(ConfigError, match="cannot listen there: Address already in use"),
        listening(path),
    ):
        pass
    assert path.read_text() == "mine"


def test_a_path_that_no_socket_can_have_is_refused(short_folder: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"), listening(short_folder / ("x" * 108)):  # fmt: skip
        pass


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"FLLM" + (2**40).to_bytes(8, "big"),
        b"FLLM" + (2).to_bytes(8, "big") + b"{}",
        b"FLLM" + (50).to_bytes(8, "big") + b'{"runs"',
    ],
)
def test_it_survives_clients_that_talk_nonsense(
    sent: bytes, message: Fixture, node: Fixture, serving: Fixture
) -> None:
    path = serving(echo)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(path))
        rude.sendall(sent)
    assert asking.ask(message(), node(path)) is not None


@pytest.mark.parametrize("sizes", [None, [1, "2"], "ab", [True, {}]])
def test_it_survives_a_hello_without_sizes(
    sizes: Any, message: Fixture, node: Fixture, serving: Fixture
) -> None:
    path = serving(echo)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(path))
        protocol.send_json(rude, {"runs": protocol.identity(), "sizes": sizes})
        with pytest.raises((DaemonError, ConnectionError)):
            protocol.receive_json(rude, "welcome")
    assert asking.ask(message(), node(path)) is not None


def hello(path: Path) -> socket.socket:
    """A client that was welcomed, and may send a context and a message."""
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(str(path))
    protocol.send_json(stream, {"runs": protocol.identity(), "sizes": [10, 10]})
    assert protocol.receive_json(stream, "welcome") == {}
    return stream


def test_it_survives_clients_that_die_half_way(
    message: Fixture, node: Fixture, serving: Fixture
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(asked: Message, context: Context) -> Message:
        begun.set()
        assert may_end.wait(30)
        return echo(asked, context)

    path = serving(slow)
    before_message = hello(path)
    protocol.send(before_message, protocol.context_bytes(node(path)))
    before_message.close()
    before_reply = hello(path)
    protocol.send(before_reply, protocol.context_bytes(node(path)))
    protocol.send(before_reply, protocol.message_bytes(message()))
    assert begun.wait(30)
    before_reply.close()
    may_end.set()
    assert asking.ask(message(), node(path)) is not None


def test_bytes_that_do_not_decode_are_an_error_and_not_the_end(
    message: Fixture, node: Fixture, serving: Fixture
) -> None:
    path = serving(echo)
    with hello(path) as stream:
        protocol.send(stream, b"\xff\xff")
        protocol.send(stream, b"\xff\xff")
        outcome = protocol.receive_json(stream, "outcome")
    assert outcome["kind"] == "DaemonError"
    assert outcome["text"].startswith("context: does not decode")
    assert asking.ask(message(), node(path)) is not None


def test_a_client_that_hangs_does_not_hold_up_the_others(
    message: Fixture, node: Fixture, serving: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PAUSE_SECONDS", 3.0)
    path = serving(echo)
    with hello(path):
        assert asking.ask(message(), node(path)) is not None


def test_messages_are_handled_one_at_a_time(
    message: Fixture, node: Fixture, serving: Fixture
) -> None:
    inside, most = [0], [0]

    def counted(asked: Message, context: Context) -> Message:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.05)
        inside[0] -= 1
        return echo(asked, context)

    path = serving(counted)
    replies: list[Message | None] = []
    clients = [
        threading.Thread(target=lambda: replies.append(asking.ask(message(), node(path))))
        for _ in range(4)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30)
    assert len([reply for reply in replies if reply is not None]) == 4
    assert most == [1]


def test_a_stop_is_told_to_the_client_whose_message_it_interrupts(
    message: Fixture, node: Fixture, short_folder: Path
) -> None:
    def stopped(asked: Message, context: Context) -> Message:
        raise KeyboardInterrupt  # as a signal does

    path = short_folder / "socket"
    said: list[str] = []

    def client() -> None:
        try:
            asking.ask(message(), node(path))
        except DaemonError as error:
            said.append(str(error))

    with listening(path) as server:
        asker = threading.Thread(target=client)
        asker.start()
        with pytest.raises(KeyboardInterrupt):
            Daemon(stopped).serve(server)
        asker.join(30)
    assert said == ["the daemon was stopped while it worked on this message"]
