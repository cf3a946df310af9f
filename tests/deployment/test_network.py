"""Real SuperLinks with TLS and authenticated SuperNodes, on loopback."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fedllm_flwr import cli
from fedllm_flwr.deploying.keys import make_node_key
from fedllm_flwr.deploying.network import LocalNetwork, supernode_command
from fedllm_flwr.processes import free_port, tool
from fedllm_flwr.runs.directory import RunDirectory

pytestmark = [pytest.mark.deployment, pytest.mark.slow]
NEVER_JOINED = 305
"""Flower's exit code of a SuperNode that cannot connect."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalNetwork, Path]]:
    """A network that is up."""
    folder = tmp_path_factory.mktemp("network")
    found = LocalNetwork(folder / "net", 1)
    with found.running():
        yield found, folder


def joined(network: LocalNetwork, command: list[str], log: Path) -> int | None:
    """Start a node that should not get in; its exit code, or None if it is still there after a while."""
    with log.open("wb") as output:
        node = subprocess.Popen([tool(command[0]), *command[1:]], env=network.environment(), stdout=output,
                                stderr=output)  # fmt: skip
        try:
            return node.wait(timeout=60)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
            return None


def test_a_key_that_nobody_registered_is_refused(network: tuple[LocalNetwork, Path]) -> None:
    found, folder = network
    stranger = folder / "stranger"
    make_node_key(stranger)
    command = supernode_command(
        found.files.authority, stranger, found.address, free_port(), found.facts(0)
    )
    code = joined(found, command, folder / "stranger.log")
    said = (folder / "stranger.log").read_text()
    assert code not in (None, 0), said
    assert "2004" in said, said


def test_a_node_without_tls_is_refused(network: tuple[LocalNetwork, Path]) -> None:
    found, folder = network
    command = ["flower-supernode", "--insecure", "--superlink", found.address, "--host", "127.0.0.1", "--port",
               str(free_port()), "--max-retries", "1", "--node-config", found.facts(0).text()]  # fmt: skip
    code = joined(found, command, folder / "plain.log")
    assert code not in (None, 0), (folder / "plain.log").read_text()


def test_an_experiment_gives_the_loopback_runs_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=smoke", "num_rounds=1", "baselines=none", "partition.num_clients=2",
                "task.train_rows=16", "task.validation_rows=4", "task.test_rows=8", "runtime.device=cpu",
                "runtime.dtype=float32"]  # fmt: skip
    assert cli.main([*settings, "runtime=loopback", "out_dir=loopback"]) == 0
    assert (
        cli.main(["deploy", "--folder", "net", "--nodes", "2", *settings, "out_dir=deployed"]) == 0
    )
    one, other = (RunDirectory.open(tmp_path / name) for name in ("loopback", "deployed"))
    assert other.summary()["accuracy"] == one.summary()["accuracy"]
    ours, theirs = (
        load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, atol=1e-6)
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
    assert left == [], "every process has ended"
