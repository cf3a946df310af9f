"""Child processes: find a command, a free port, wait until someone listens, and stop a whole tree."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from fedllm_flwr.errors import ConfigError, RunStoppedError

START_SECONDS = 180.0
"""For a busy machine; a process that ends instead is noticed at once."""


def stop_tree(
    process: subprocess.Popen[bytes] | psutil.Process, patience_seconds: float = 15.0
) -> None:
    """Stop a process and everything that it started, also what has left its group (a ServerApp, Ray)."""
    try:
        root = psutil.Process(process.pid)
        members = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        members = []
    for how in ("terminate", "kill"):
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(member, how)()
        _, members = psutil.wait_procs(members, timeout=patience_seconds)
    if isinstance(process, subprocess.Popen):
        process.poll()


def tool(name: str) -> str:
    """A command of this environment, found beside the interpreter even when the environment is not activated.

    Raises:
        ConfigError: There is no such command.
    """
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise ConfigError(
            f"{name}: expected it beside {sys.executable} or on PATH; install the project's environment"
        )
    return found


def free_port() -> int:
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process listens on a loopback port; see :func:`wait_for` for the other arguments and the error."""

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return True
        return False

    wait_for(answers, process, log, f"to listen on port {port}")


def wait_for(
    is_ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, what: str
) -> None:
    """Wait until a process is ready.

    Args:
        is_ready: Whether it is.
        process: The process; if it ends, nobody waits any longer.
        log: Its log, for the message.
        what: What it should start to do, for the message.

    Raises:
        RunStoppedError: It ended, or three minutes have passed; the message holds the end of its log.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready():
            return
        time.sleep(0.1)
    end = " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
    raise RunStoppedError(f"the process did not start {what}: {end}")
