"""``fedllm deploy``: a network for trials on this machine, and the commands for the real thing."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedllm_flwr.actions import run_experiment, show_run
from fedllm_flwr.cascade_actions import cascade_at_clients
from fedllm_flwr.compose import Composed, compose_run
from fedllm_flwr.core import default_out_dir
from fedllm_flwr.deploying.keys import ServerFiles
from fedllm_flwr.deploying.network import (
    HOST,
    LocalNetwork,
    NodeFacts,
    connection_text,
    daemon_command,
    register_command,
    shown,
    superexec_command,
    superlink_command,
    supernode_command,
)
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.federated_cascade import ACTIONS as AT_CLIENTS
from fedllm_flwr.launch import CONNECTION, SuperLink
from fedllm_flwr.project import find_project
from fedllm_flwr.unread import refuse_unread
from fedllm_flwr.words import Words

REAL_HOST = "superlink.example.org"
PROXY_PORT, LINK_PORT = 8443, 8000
"""What nodes reach, a proxy for their API alone, and what only the SuperLink's machine reaches."""
ALIVE_SECONDS = 0.5
NETWORK_SETS = (
    "runtime",
    *(f"runtime.{name}" for name in ("connection", "num_nodes", "data_path", "model_path")),
)

ON_THE_NETWORK = ("runtime=deployment", f"runtime.connection={CONNECTION}")


def deploy(words: Sequence[str]) -> int:
    """Start a SuperLink and SuperNodes on loopback, run an experiment on them if one is named, and stop them.

    Args:
        words: ``--nodes N --folder DIR --daemon --dry-run key=value ...``. Without settings the network
            stays up until it is interrupted.

    Returns:
        0.

    Raises:
        ConfigError: An option or a setting is wrong; nothing was started.
        RunStoppedError: A process did not start or ended, or the run gave up.
    """
    chosen = _parsed(words)
    settings: list[str] = list(chosen.settings)
    if settings:
        _refuse_runtime(settings)
        composed = _composed([*settings, *ON_THE_NETWORK])
        config = composed.config
        if composed.action not in ("run", *AT_CLIENTS):
            raise ConfigError(
                f"deploy: action={composed.action}: expected one that clients take part in: run or "
                f"{' or '.join(AT_CLIENTS)}"
            )
        if composed.action == "run":
            refuse_unread([config], settings)
        nodes = chosen.nodes or min(2, config.partition.num_clients)
        if nodes > config.partition.num_clients:
            raise ConfigError(
                f"deploy: expected at most as many nodes as clients ({config.partition.num_clients}), got {nodes}"
            )
        settings += [f"runtime.num_nodes={nodes}"]
    else:
        nodes = chosen.nodes or 2
    network = LocalNetwork(
        Path(chosen.folder),
        nodes,
        chosen.data_path,
        chosen.model_path,
        asking=nodes if chosen.daemon else 0,
    )
    if chosen.dry_run:
        print("\n".join(["# on this machine", *map(shown, network.commands()), "", *real_commands(nodes)]))  # fmt: skip
        return 0
    with network.running() as link:
        place = f"{nodes} SuperNodes and a SuperLink at {network.address}"
        print(f"{place}; logs in {network.folder / 'logs'}", file=sys.stderr)
        if settings:
            _run(settings, link)
        else:
            _stay(network, link)
    print("\n".join(["", "# the real thing", *real_commands(nodes)]))
    return 0


def real_commands(nodes: int) -> list[str]:
    """What operators type on their own machines, with a comment to say where.

    Args:
        nodes: SuperNodes of the federation.

    Returns:
        Lines of a shell script as docs/deployment.md explains them; every path and host is an example. The SuperLink
        listens on loopback, since its control port has no authentication: whoever reaches it runs code on every node.
    """
    link, proxy = f"{HOST}:{LINK_PORT}", f"{REAL_HOST}:{PROXY_PORT}"
    files = ServerFiles(Path("ca.crt"), Path("server.pem"), Path("server.key"))
    facts = NodeFacts(0, nodes, data_path="/srv/fedllm/data.csv", state_path="/srv/fedllm/state",
                      daemon_socket="/srv/fedllm/run/daemon.socket")  # fmt: skip
    connection = connection_text(link, Path("/etc/fedllm/ca.crt")).rstrip().splitlines()
    superlink = superlink_command(files, HOST, LINK_PORT, Path("state.db"))
    return [
        "# each site makes its own key and sends node.pub to the operator of the SuperLink",
        'ssh-keygen -t ecdsa -b 384 -N "" -f node',
        "# at the SuperLink, on loopback alone: whoever reaches this port can run code on every node",
        shown([*superlink, "--isolation", "process"]),
        shown(superexec_command(files.authority, link)),
        f"# a proxy at {proxy} lets nodes reach /v1/fleet/ and nothing else: see docs/deployment.md",
        "# where runs are submitted, on the SuperLink's machine or through an SSH tunnel: ~/.flwr/config.toml holds",
        *(f"#   {line}" for line in connection if line),
        shown(register_command(Path("node.pub"), "site-0")),
        "# at each site, with its own place of 0 to "
        + str(nodes - 1)
        + "; the daemon may be left out",
        shown(daemon_command(Path("/srv/fedllm/run/daemon.socket"))),
        shown(supernode_command(files.authority, Path("node"), proxy, 9094, facts)),
        "# then",
        f"fedllm experiment=NAME runtime=deployment runtime.connection={CONNECTION} runtime.num_nodes={nodes}",
    ]


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = Words(prog="fedllm deploy", description=(deploy.__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=0, help="SuperNodes; default 2")
    parser.add_argument("--folder", default="outputs/network", help="keys, logs and database")
    parser.add_argument(
        "--data-path", default="", help="the nodes' data file; {node} = a node's place"
    )
    parser.add_argument("--model-path", default="", help="the nodes' model folder")
    parser.add_argument(
        "--daemon", action="store_true", help="keep the model loaded between messages"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="an experiment to run")
    chosen = parser.parse_args(list(words))
    if chosen.nodes < 0:
        raise ConfigError(f"deploy: --nodes: expected >= 1, got {chosen.nodes}")
    return chosen


def _refuse_runtime(settings: Sequence[str]) -> None:
    """The network decides who carries the run.

    Raises:
        ConfigError: A setting would say otherwise.
    """
    for setting in settings:
        name = setting.lstrip("+").partition("=")[0]
        if name in NETWORK_SETS:
            raise ConfigError(
                f"deploy: {setting}: the trial network sets it, use --nodes, --data-path or --model-path"
            )


def _composed(settings: Sequence[str]) -> Composed:
    return compose_run(settings, find_project(Path.cwd()))


def _run(settings: Sequence[str], link: SuperLink) -> None:
    """Run one experiment on the network, or what it asks of a cascade at the clients."""
    kept = [*settings, *ON_THE_NETWORK]
    composed = _composed(kept)
    if composed.action in AT_CLIENTS:
        cascade_at_clients(composed, kept, link)
        return
    config = composed.config
    out_dir = config.out_dir or default_out_dir(config)
    run_experiment(replace(config, out_dir=out_dir), kept, out_dir, link)
    show_run(Path(out_dir))


def _stay(network: LocalNetwork, link: SuperLink) -> None:
    """Keep the network up until an interrupt.

    Raises:
        RunStoppedError: The SuperLink has ended.
    """
    print(
        f"in another terminal:\n  export FLWR_HOME={network.home}\n  fedllm experiment=NAME runtime=deployment "
        f"runtime.connection={CONNECTION} runtime.num_nodes={network.num_nodes}\nCtrl-C stops it",
        file=sys.stderr,
    )
    sys.stderr.flush()
    try:
        while link.process.poll() is None:
            time.sleep(ALIVE_SECONDS)
    except KeyboardInterrupt:
        return
    raise RunStoppedError(f"the SuperLink has ended; its log is {os.fspath(link.log)}")
