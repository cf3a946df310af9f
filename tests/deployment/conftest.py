"""A federation of real processes whose parts can be killed and brought back one by one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedllm_flwr.deploying.keys import make_node_key, make_server_files
from fedllm_flwr.deploying.network import (
    HOST,
    LocalNetwork,
    connection_text,
    daemon_command,
    superexec_command,
    superlink_command,
    supernode_command,
)
from fedllm_flwr.launch import CONNECTION
from fedllm_flwr.processes import free_port, stop_tree, tool, wait_for, wait_for_port
from fedllm_flwr.runs.directory import RunDirectory

NODES = 3
PATIENCE_SECONDS = float(os.environ.get("FEDLLM_TEST_PATIENCE_SECONDS", "900"))
"""For anything but a hang: Flower's own deadlines are minutes, and a busy machine may need more."""
SUPERVISED = ["bash", "-c", 'until "$@"; do sleep 5; done', "supervisor"]
"""A node that ends is started again: an identity is free only once the killed node's heartbeat has lapsed."""


def kill_tree(process: subprocess.Popen[bytes] | psutil.Process) -> None:
    """What a power cut does: kill -9 for a process and everything that it started, parents first."""
    try:
        root = psutil.Process(process.pid)
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in members:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(members, timeout=30)


def until(what: str, found: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait for something to be true; what it is goes into the failure."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
    return value


@dataclass
class Federation:
    """A SuperLink with TLS, ``--isolation process`` and a database, as docs/deployment.md starts it, and its nodes.

    The nodes name one daemon, so that a message needs no import of torch where :meth:`start_daemon` was called.

    Args:
        folder: Keys, logs, database, Flower's home.
        num_nodes: Authenticated SuperNodes.
    """

    folder: Path
    num_nodes: int = NODES
    parts: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    typed: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = LocalNetwork(self.folder, self.num_nodes, asking=self.num_nodes)
        self.files = make_server_files(self.network.folder, [HOST, "localhost"])
        self.network.home.mkdir(parents=True)
        text = connection_text(self.network.address, self.files.authority)
        (self.network.home / "config.toml").write_text(text)
        for name in ("logs", "empty"):
            (self.folder / name).mkdir()
        self.environment = self.network.environment() | {
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }

    def start_superlink(self) -> None:
        database = self.folder / "state.db"
        command = superlink_command(self.files, HOST, self.network.port, database)
        process = self.start("superlink", [*command, "--isolation", "process"])
        wait_for_port(self.network.port, process, self.log("superlink"))

    def start_superexec(self) -> None:
        self.start("superexec", superexec_command(self.files.authority, self.network.address))

    def start_daemon(self) -> None:
        self.serve_messages("daemon", daemon_command(self.network.socket), self.network.socket)

    def serve_messages(self, name: str, command: list[str], socket: Path) -> None:
        """Start what handles nodes' messages, and wait until it listens."""
        process = self.start(name, command)
        wait_for(socket.is_socket, process, self.log(name), "to listen")

    def start_node(
        self,
        place: int,
        *options: str,
        name: str = "",
        through: str = "",
        asks: Path | None = None,
    ) -> None:
        """Start a place's node under a supervisor.

        Args:
            place: Its place.
            options: Further ones of ``flower-supernode``.
            name: Whose key it has, made and registered the first time; default ``node-<place>``.
            through: The address that it connects to, if not the SuperLink's.
            asks: The socket that it hands its messages to, if not the daemon's.
        """
        name = name or f"node-{place}"
        key = self.folder / "keys" / name
        if not key.exists():
            self.network.register(make_node_key(key), name)
        address, facts = through or self.network.address, self.network.facts(place)
        if asks is not None:
            facts = replace(facts, daemon_socket=str(asks))
        command = supernode_command(self.files.authority, key, address, free_port(), facts)
        found = [tool(command[0]), *command[1:], *options]
        self.start(name, [*SUPERVISED, *found])

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        program = command[0] if command[0] == "bash" else tool(command[0])
        with self.log(name).open("ab") as output:
            process = subprocess.Popen([program, *command[1:]], cwd=self.folder / "empty",
                                       env=self.environment, stdout=output, stderr=output,
                                       start_new_session=True)  # fmt: skip
        self.parts[name] = process
        return process

    def kill(self, *names: str) -> None:
        for name in names:
            process = self.parts.pop(name)
            kill_tree(process)
            process.wait()

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def server_app(self) -> psutil.Process | None:
        """The ServerApp's process, the newest if there are several: a child of the superexec."""
        found: list[psutil.Process] = []
        for child in psutil.Process(self.parts["superexec"].pid).children(recursive=True):
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # also one that is dead and not yet buried
                if "flwr-serverapp" in " ".join(child.cmdline()):
                    found.append(child)
        return max(found, key=lambda child: child.create_time(), default=None)

    def begun(self) -> int:
        """How many ServerApps have taken up their work; Flower starts one that dies before that once more."""
        return self.log("superlink").read_text().count("Started task")

    @staticmethod
    def until(what: str, found: Callable[[], Any]) -> Any:
        return until(what, found)

    def run(self, out_dir: Path, *settings: str) -> "Submitted":
        """Type ``fedllm`` for a run on this federation."""
        words = [*settings, "runtime=deployment", f"runtime.connection={CONNECTION}",
                 f"runtime.num_nodes={self.num_nodes}", f"out_dir={out_dir}"]  # fmt: skip
        return self.type(out_dir, *words)

    def resume(self, out_dir: Path) -> "Submitted":
        return self.type(out_dir, "action=resume", f"run={out_dir}")

    def type(self, out_dir: Path, *words: str) -> "Submitted":
        log = self.log(f"submitted-{out_dir.name}")
        with log.open("ab") as output:
            process = subprocess.Popen([sys.executable, "-m", "fedllm_flwr", *words], cwd=self.folder / "empty",
                                       env=self.environment, stdout=output, stderr=output)  # fmt: skip
        self.typed.append(process)
        return Submitted(process, out_dir, log)

    def flwr(self, *words: str) -> str:
        """What a ``flwr`` command prints."""
        done = subprocess.run([tool("flwr"), *words], cwd=self.folder / "empty", env=self.environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        return done.stdout + done.stderr

    def fedllm(self, *words: str) -> str:
        """What a ``fedllm`` command prints."""
        done = subprocess.run([sys.executable, "-m", "fedllm_flwr", *words], cwd=self.folder / "empty",
                              env=self.environment, capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout

    def runs(self) -> dict[str, str]:
        """Flower's word on every run, by run id."""
        shown = json.loads(self.flwr("ls", CONNECTION, "--format", "json"))
        return {str(run["run-id"]): str(run["status"]) for run in shown["runs"]}


@dataclass
class Submitted:
    """A ``fedllm`` command that carries a run, and the run directory that it fills."""

    process: subprocess.Popen[bytes]
    out_dir: Path
    log: Path

    def records(self, kind: str) -> list[dict[str, Any]]:
        if not (self.out_dir / "manifest.json").exists():
            return []
        return RunDirectory.open(self.out_dir).records(kind)

    def failed(self, server_round: int) -> set[int]:
        """Who was left out of a round, or asked again in it."""
        return {f["partition_id"] for f in self.records("failure") if f["round"] == server_round}

    def until_round(self, server_round: int) -> None:
        """Wait until a round's cohort has been asked to train."""
        begun = lambda: [record["round"] for record in self.records("started")]  # noqa: E731
        self.until(f"round {server_round}", lambda: server_round in begun())

    def until(self, what: str, found: Callable[[], Any]) -> Any:
        def alive() -> Any:
            value = found()
            assert value or self.process.poll() is None, f"ended before {what}: {self.said()}"
            return value

        return until(what, alive)

    def kill(self) -> None:
        kill_tree(self.process)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def ended(self, code: int = 0) -> RunDirectory:
        """Wait for the end; the run directory."""
        assert self.process.wait(PATIENCE_SECONDS) == code, self.said()
        return RunDirectory.open(self.out_dir)


@pytest.fixture(scope="session")
def federation_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Start a SuperLink for some nodes; the nodes are for the caller to start. Everything is stopped at the end."""

    @contextlib.contextmanager
    def running(num_nodes: int) -> Iterator[Federation]:
        found = Federation(tmp_path_factory.mktemp("federation") / "net", num_nodes)
        try:
            found.start_superlink()
            found.start_superexec()
            yield found
        finally:
            for process in [*found.typed, *reversed(found.parts.values())]:
                stop_tree(process)
                process.wait()

    return running


@pytest.fixture(scope="module")
def federation(federation_of: Callable[..., Any]) -> Iterator[Federation]:
    """Three authenticated nodes and a daemon that are up; whatever a test kills it brings back."""
    with federation_of(NODES) as found:
        found.start_daemon()
        for place in range(NODES):
            found.start_node(place)
        yield found
