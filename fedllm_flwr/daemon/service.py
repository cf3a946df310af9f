"""The daemon: takes one message after the other from a Unix socket and handles each as a client process would."""

import contextlib
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Context, Message

from fedllm_flwr.daemon import protocol
from fedllm_flwr.errors import ConfigError, DaemonError

LOG = logging.getLogger(__name__)
PAUSE_SECONDS = 30.0
"""Longest pause within what a client sends or takes; a client that hangs must not hold up the others."""
WAITING = 64
"""Clients that may wait for their turn."""
LONGEST_PATH = 107
"""Bytes of a socket's path, on Linux."""
Handler = Callable[[Message, Context], Message]


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket at a path that only its user can open; the path is free again afterwards.

    Args:
        path: In a folder that is the user's alone to write to; one that is absent is made, for the user alone.

    Raises:
        ConfigError: The folder is open to others, another daemon or a file has the path, or there are no such sockets.
    """
    path = path.expanduser().absolute()
    if not hasattr(socket, "SO_PEERCRED"):
        raise ConfigError("daemon: expected a system that says who is at the other end (Linux)")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(f"daemon: {path}: expected a path of at most {LONGEST_PATH} bytes")
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_folder(path.parent)
            held.enter_context(_only_daemon(path))
            server = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            _bind(server, path)
            held.callback(path.unlink, missing_ok=True)
            server.listen(WAITING)
        except OSError as error:
            raise ConfigError(f"daemon: {path}: cannot listen there: {error.strerror or error}") from error  # fmt: skip
        yield server


def _bind(server: socket.socket, path: Path) -> None:
    """Bind, so that at no time anybody else could open the socket."""
    if path.is_socket():  # of a daemon that was killed: a living one holds the lock
        path.unlink()
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which somebody else could put another socket in the place of ours.

    Raises:
        ConfigError: It belongs to, or can be written by, others.
    """
    facts = folder.stat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o022:
        raise ConfigError(
            f"daemon: {folder}: expected a folder of user {os.getuid()} that only this user can write to, got one of "
            f"user {facts.st_uid} with mode {stat.S_IMODE(facts.st_mode):o}"
        )


@contextlib.contextmanager
def _only_daemon(path: Path) -> Iterator[None]:
    """Hold the path; the system lets go of it when this process ends, however it ends.

    Raises:
        ConfigError: Another daemon holds it.
    """
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"daemon: {path}: another daemon listens there") from None
        yield
    finally:
        os.close(lock)


class Daemon:
    """Handles messages, one at a time.

    Args:
        handle: What a client process would do with a message.
        limit_bytes: Largest context and largest message, each.
    """

    def __init__(self, handle: Handler, limit_bytes: int = protocol.LARGEST_BYTES) -> None:
        self._handle = handle
        self._limit = min(limit_bytes, protocol.LARGEST_BYTES)
        self._runs = protocol.identity()

    def serve(self, server: socket.socket) -> None:
        """Serve until an interrupt; a message that is being handled then is answered with an error.

        Args:
            server: From :func:`listening`.
        """
        while True:
            stream, _ = server.accept()
            with stream:
                stream.settimeout(PAUSE_SECONDS)
                try:
                    self._converse(stream)
                except (OSError, DaemonError) as error:
                    LOG.warning("a client was left: %s", error)

    def _converse(self, stream: socket.socket) -> None:
        protocol.check_peer(stream)
        if not self._welcomes(stream):
            return
        content = [protocol.receive(stream, self._limit, what) for what in ("context", "message")]
        try:
            outcome, context, reply = self._answered(*content)
        except KeyboardInterrupt:
            ended = DaemonError("the daemon was stopped while it worked on this message")
            with contextlib.suppress(OSError):
                protocol.send_json(stream, {**protocol.error_facts(ended), "is-lost": True})
            raise
        protocol.send_json(stream, outcome)
        if not outcome.get("is-lost"):
            protocol.send(stream, context)
        if not outcome:
            protocol.send(stream, reply)

    def _welcomes(self, stream: socket.socket) -> bool:
        """Whether the client runs what the daemon runs, and is not about to send too much."""
        hello = protocol.receive_json(stream, "hello")
        if differs := protocol.difference(self._runs, hello.get("runs")):
            protocol.send_json(stream, {"differs": differs})
            LOG.warning("a client was refused: %s", differs)
            return False
        sizes = hello.get("sizes")
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            raise DaemonError(f"hello: expected two sizes, got {sizes!r:.80}")
        if max(sizes, default=0) > self._limit:
            error = DaemonError(f"message: expected at most {self._limit} bytes, got {max(sizes)}")
            protocol.send_json(stream, protocol.error_facts(error))
            LOG.warning("a client was refused: %s", error)
            return False
        protocol.send_json(stream, {})
        return True

    def _answered(self, sent: bytes, asked: bytes) -> tuple[dict[str, object], bytes, bytes]:
        """The outcome, the context afterwards and the reply."""
        try:
            context = protocol.read_context(sent)
            message = protocol.read_message(asked)
        except DaemonError as error:
            return {**protocol.error_facts(error), "is-lost": True}, b"", b""
        try:
            reply = self._handle(message, context)
            outcome: dict[str, object] = {}
        except Exception as error:
            LOG.error("%s raised an error", message.metadata.message_type, exc_info=True)
            outcome, reply = protocol.error_facts(error), None
        try:
            after = protocol.context_bytes(context)
            return outcome, after, b"" if reply is None else protocol.message_bytes(reply)
        except DaemonError as error:  # it has grown beyond what protobuf can hold
            return {**protocol.error_facts(error), "is-lost": True}, b"", b""
