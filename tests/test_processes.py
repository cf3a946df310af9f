import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedllm_flwr import processes
from fedllm_flwr.errors import ConfigError, RunStoppedError


def test_a_tool_is_found_beside_the_interpreter_and_else_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(ConfigError, match=r"flwr: expected it beside .* or on PATH"):
        processes.tool("flwr")
    for folder in ("path", "bin"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "flwr").write_text("#!/bin/sh\n")
        (tmp_path / folder / "flwr").chmod(0o755)
        assert processes.tool("flwr") == str(tmp_path / folder / "flwr")


def test_a_free_port_can_be_had() -> None:
    with socket.socket() as taker:
        taker.bind(("127.0.0.1", processes.free_port()))


def test_waiting_ends_when_somebody_listens_or_the_process_has_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nthe port is taken\n")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(RunStoppedError, match=r"port \d+: first \| the port is taken"):
        processes.wait_for_port(processes.free_port(), process, log)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        processes.wait_for_port(listener.getsockname()[1], sleeper, log)
    processes.stop_tree(sleeper)
    assert sleeper.poll() is not None


FAMILY = """
import os, signal, subprocess, sys, time
if len(sys.argv) > 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    child = subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
print("ready", flush=True)
time.sleep(120)
"""


def test_everything_that_a_process_started_is_stopped_with_it(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    assert os.getsid(child.pid) != os.getsid(process.pid), "it has left the group"
    processes.stop_tree(process, patience_seconds=1.0)
    process.stdout.close()
    assert process.poll() is not None
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child that ignores SIGTERM still runs"
        time.sleep(0.05)


def test_stopping_what_has_ended_is_harmless() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    processes.stop_tree(process)
