"""A daemon in a thread of the test's own, with whatever handles its messages; and messages for it."""

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedllm_flwr import records
from fedllm_flwr.daemon.asking import SOCKET
from fedllm_flwr.daemon.service import Daemon, listening


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder of the user's with a path that leaves room for a socket's name."""
    folder = Path(tempfile.mkdtemp(prefix="fedllm-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def serving(short_folder: Path) -> Iterator[Callable[..., Path]]:
    """Start a daemon; its socket's path."""
    with ExitStack() as running:

        def start(handle: Callable[[Message, Context], Message], **options: int) -> Path:
            path = short_folder / "own" / "daemon.socket"
            running.enter_context(_thread(path, Daemon(handle, **options)))
            return path

        yield start


@contextmanager
def _thread(path: Path, daemon: Daemon) -> Iterator[None]:
    with listening(path) as server:

        def serve() -> None:
            with suppress(OSError):  # its socket was shut down
                daemon.serve(server)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.fixture
def node() -> Callable[..., Context]:
    """A node's context that names a daemon."""

    def make(path: Path | str, **facts: Any) -> Context:
        places = {"partition-id": 0, "num-partitions": 1, SOCKET: str(path)}
        given = {name.replace("_", "-"): value for name, value in facts.items()}
        return Context(
            run_id=7,
            node_id=9,
            node_config={**places, **given},
            state=RecordDict(),
            run_config={"a": 1},
        )

    return make


@pytest.fixture
def message() -> Callable[..., Message]:
    """A training message."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1

    def make(body: dict[str, Any] | None = None, **parts: Any) -> Message:
        made = Message(
            records.instruction(body or {}, parts, "float32"), 9, records.TRAIN, group_id="g"
        )
        made.metadata.__dict__["_message_id"] = "asked"
        return made

    return make
