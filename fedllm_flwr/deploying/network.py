"""A whole federation on one machine: a SuperLink with TLS and authenticated SuperNodes, as child processes.

What is started here is what operators start, with the same commands; only the addresses are loopback.
"""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm_flwr.daemon.asking import SOCKET
from fedllm_flwr.deploying.keys import ServerFiles, make_node_key, make_server_files
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.launch import CONNECTION, SuperLink
from fedllm_flwr.processes import free_port, stop_tree, tool, wait_for, wait_for_port
from fedllm_flwr.settings.runtime import STATE_PATH_VARIABLE

HOST = "127.0.0.1"
UNQUOTABLE = '"\\\n\r'


@dataclass(frozen=True)
class NodeFacts:
    """What a node knows and a run cannot tell it: its place, and where its files are (empty: not given)."""

    place: int
    num_nodes: int
    data_path: str = ""
    model_path: str = ""
    state_path: str = ""
    daemon_socket: str = ""

    def text(self) -> str:
        """The facts in the form of ``flower-supernode --node-config``.

        Raises:
            ConfigError: A path has a character that would end its text, and could begin another fact.
        """
        paths = {"data-path": self.data_path, "model-path": self.model_path, "state-path": self.state_path,
                 SOCKET: self.daemon_socket}  # fmt: skip
        for name, path in paths.items():
            if set(path) & set(UNQUOTABLE):
                raise ConfigError(
                    f"{name}: expected a path without quotes and backslashes, got {path!r}"
                )
        named = [f'{name}="{path}"' for name, path in paths.items() if path]
        return " ".join([f"partition-id={self.place}", f"num-partitions={self.num_nodes}", *named])


def superlink_command(files: ServerFiles, host: str, port: int, database: Path) -> list[str]:
    """``flower-superlink`` with TLS, node authentication and a database that outlives it."""
    return [
        "flower-superlink", "--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate),
        "--ssl-keyfile", str(files.key), "--enable-supernode-auth", "--host", host, "--port", str(port),
        "--database", str(database), "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def superexec_command(authority: Path, superlink: str) -> list[str]:
    """``flower-superexec``: starts the ServerApps of a SuperLink that does not (``--isolation process``)."""
    return [
        "flower-superexec", "--root-certificates", str(authority), "--runtime-api-address", superlink,
    ]  # fmt: skip


def register_command(public_key: Path, name: str) -> list[str]:
    """``flwr supernode register``: from now on this key's owner may join."""
    return ["flwr", "supernode", "register", str(public_key), CONNECTION, "--name", name]


def supernode_command(
    authority: Path, private_key: Path, superlink: str, port: int, facts: NodeFacts
) -> list[str]:
    """``flower-supernode`` that trusts one authority and proves who it is."""
    return [
        "flower-supernode", "--superlink", superlink, "--root-certificates", str(authority),
        "--auth-supernode-private-key", str(private_key), "--host", HOST, "--port", str(port),
        "--node-config", facts.text(),
    ]  # fmt: skip


def daemon_command(socket: Path) -> list[str]:
    """``fedllm daemon``: keeps the model between the messages of a site's nodes."""
    return ["fedllm", "daemon", "--socket", str(socket)]


def connection_text(superlink: str, authority: Path) -> str:
    """The connection's table for Flower's ``config.toml``."""
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{superlink}"\n'
        f'root-certificates = "{authority}"\n'
    )


@dataclass
class LocalNetwork:
    """A SuperLink and SuperNodes on this machine.

    Attributes:
        processes: What has been started, by the name of its log.

    Args:
        folder: Where keys, logs, the database and Flower's home are; an existing one is used again.
        num_nodes: SuperNodes, at least 1.
        data_path: The nodes' data file, absolute or from the working directory; ``{node}`` stands for a node's place.
            Empty for tasks that need none.
        model_path: The same for a model folder.
        port: The SuperLink's.
        asking: How many of the nodes, the first ones, hand their messages to a daemon; 0 starts none.

    Raises:
        ConfigError: ``num_nodes`` is below 1.
    """

    folder: Path
    num_nodes: int
    data_path: str = ""
    model_path: str = ""
    port: int = field(default_factory=lambda: free_port())
    asking: int = 0

    def __post_init__(self) -> None:
        """Check the number of nodes and find where everything is."""
        if self.num_nodes < 1:
            raise ConfigError(f"nodes: expected >= 1, got {self.num_nodes}")
        self.folder = self.folder.absolute()
        for name in ("data_path", "model_path"):  # a node does not run where the path was typed
            if path := getattr(self, name):
                setattr(self, name, os.path.abspath(path))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.home = self.folder / "flwr"
        self.address = f"{HOST}:{self.port}"
        self.socket = self.folder / "daemon" / "socket"
        self.files = ServerFiles(*(self.folder / name for name in ("ca.crt", "server.pem", "server.key")))  # fmt: skip

    def facts(self, place: int) -> NodeFacts:
        """What the node of a place knows."""
        data, model = (
            path.replace("{node}", str(place)) for path in (self.data_path, self.model_path)
        )
        state, socket = self.folder / "state" / str(place), self.socket
        return NodeFacts(
            place,
            self.num_nodes,
            data,
            model,
            str(state),
            str(socket) if place < self.asking else "",
        )

    def commands(self) -> list[list[str]]:
        """Every command that :meth:`running` runs, in order."""
        register = [register_command(self._key(n, ".pub"), f"node-{n}") for n in self.places()]
        nodes = [self._node_command(n) for n in self.places()]
        daemon = [daemon_command(self.socket)] if self.asking else []
        return [self._superlink_command(), *register, *daemon, *nodes]

    def places(self) -> range:
        """The nodes' places."""
        return range(self.num_nodes)

    @contextlib.contextmanager
    def running(self) -> Iterator[SuperLink]:
        """Start everything; stop everything at the end, however it ends.

        Yields:
            The SuperLink, to be handed to :func:`fedllm_flwr.launch.launch`.

        Raises:
            RunStoppedError: A part did not start; the message holds the end of its log.
        """
        make_server_files(self.folder, [HOST, "localhost"])
        self.home.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        (self.home / "config.toml").write_text(connection_text(self.address, self.files.authority))
        self.processes.clear()
        try:
            process = self._start(self._superlink_command(), "superlink")
            wait_for_port(self.port, process, self._log("superlink"))
            if self.asking:
                daemon = self._start(daemon_command(self.socket), "daemon")
                wait_for(self.socket.is_socket, daemon, self._log("daemon"), "to listen")
            for place in self.places():
                make_node_key(self._key(place))
                self.register(self._key(place, ".pub"), f"node-{place}")
                self._start(self._node_command(place), f"node-{place}")
            yield SuperLink(self.home, self._log("superlink"), self.environment(), process)
        finally:
            for process in reversed(self.processes.values()):
                stop_tree(process)

    def register(self, public_key: Path, name: str) -> None:
        """Let a key's owner join; a key that is registered already stays so.

        Raises:
            RunStoppedError: The SuperLink refused for another reason.
        """
        done = subprocess.run(self._found(register_command(public_key, name)), env=self.environment(), cwd=self.home,
                              capture_output=True, text=True, check=False)  # fmt: skip
        said = " ".join((done.stdout + done.stderr).split())
        if done.returncode and "[code: 23]" not in said:
            raise RunStoppedError(f"{name}: the SuperLink did not register its key: {said[-400:]}")

    def environment(self) -> dict[str, str]:
        """The environment of every process of the network."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "PASSIVE",
            STATE_PATH_VARIABLE: "",  # each node has its own
        }

    def _superlink_command(self) -> list[str]:
        return superlink_command(self.files, HOST, self.port, self.folder / "state.db")

    def _node_command(self, place: int) -> list[str]:
        key, port = self._key(place), self._node_ports()[place]
        return supernode_command(self.files.authority, key, self.address, port, self.facts(place))

    def _node_ports(self) -> list[int]:
        if not hasattr(self, "_ports"):
            self._ports = [free_port() for _ in self.places()]
        return self._ports

    def _key(self, place: int, suffix: str = "") -> Path:
        return self.folder / "keys" / f"node-{place}{suffix}"

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _start(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        """Start a process of its own session, so that an interrupt reaches it through us only."""
        neutral = self.folder / "empty"
        neutral.mkdir(exist_ok=True)
        with self._log(name).open("ab") as output:
            process = subprocess.Popen(self._found(command), cwd=neutral, env=self.environment(), stdout=output,
                                       stderr=output, start_new_session=True)  # fmt: skip
        self.processes[name] = process
        return process

    @staticmethod
    def _found(command: Sequence[str]) -> list[str]:
        return [tool(command[0]), *command[1:]]


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)
