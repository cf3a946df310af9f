"""Real SuperLinks with TLS and authenticated SuperNodes, on loopback."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fedllm_flwr import cli
from fedllm_flwr.actions import run_experiment
from fedllm_flwr.compose import compose_run
from fedllm_flwr.daemon.asking import ALONE
from fedllm_flwr.deploying.command import ON_THE_NETWORK
from fedllm_flwr.deploying.keys import make_node_key
from fedllm_flwr.deploying.network import LocalNetwork, supernode_command
from fedllm_flwr.launch import SuperLink
from fedllm_flwr.processes import free_port, tool
from fedllm_flwr.runs.directory import RunDirectory

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(3600)]
PATIENCE_SECONDS = 300
"""A refused node says so within seconds; a busy machine takes its time to start one."""


Network = tuple[LocalNetwork, Path, SuperLink]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A network of two nodes and a daemon that is up, a folder, and its SuperLink."""
    folder = tmp_path_factory.mktemp("network")
    found = LocalNetwork(folder / "net", 2, asking=2)
    with found.running() as link:
        yield found, folder, link


def joined(network: LocalNetwork, command: list[str], log: Path) -> int | None:
    """Start a node that should not get in; its exit code, or None if it is still there after a while."""
    with log.open("wb") as output:
        node = subprocess.Popen([tool(command[0]), *command[1:]], env=network.environment(), stdout=output,
                                stderr=output)  # fmt: skip
        try:
            return node.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
            return None


def test_a_key_that_nobody_registered_is_refused(network: Network) -> None:
    found, folder, _ = network
    stranger = folder / "stranger"
    make_node_key(stranger)
    command = supernode_command(
        found.files.authority, stranger, found.address, free_port(), found.facts(0)
    )
    code = joined(found, command, folder / "stranger.log")
    said = (folder / "stranger.log").read_text()
    assert code not in (None, 0), said
    assert "2004" in said, said


def test_a_node_without_tls_is_refused(network: Network) -> None:
    found, folder, _ = network
    command = ["flower-supernode", "--insecure", "--superlink", found.address, "--host", "127.0.0.1", "--port",
               str(free_port()), "--max-retries", "1", "--node-config", found.facts(0).text()]  # fmt: skip
    code = joined(found, command, folder / "plain.log")
    assert code not in (None, 0), (folder / "plain.log").read_text()


SMALL = ("experiment=smoke", "num_rounds=1", "baselines=none", "partition=iid", "partition.num_clients=2",
         "task.train_rows=16", "task.validation_rows=4", "task.test_rows=8", "client.local_epochs=0",
         "client.local_steps=2", "client.batch_size=4", "runtime.device=cpu", "runtime.dtype=float32",
         "runtime.num_nodes=2")  # fmt: skip
METHODS = {
    "fedresprompt": ("method=fedresprompt", "strategy=controller_mean", "method.length=2", "method.controller_size=4",
                     "method.reservoir_size=20", "method.input_size=6"),
    "fedprompt": ("method=fedprompt", "strategy=prompt_mean", "method.length=4", "method.personal_length=2"),
    "fedlora": (),
}  # fmt: skip
TOLERANCE = 1e-5
"""Of trained values and losses: the server of a loopback run has set float32 products for the whole process, a node's
client process sets its own, and two steps of Adam at 1e-3 turn that into less than this."""


def final(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A run's summary, and every array that it exports."""
    run = RunDirectory.open(folder)
    files = sorted((run.path / "adapter").rglob("*.safetensors"))
    assert files
    arrays = {f"{file.name}/{name}": a for file in files for name, a in load_file(file).items()}
    return run.summary(), arrays


@pytest.mark.parametrize("method", METHODS)
def test_a_network_gives_the_loopback_runs_final_figures(
    method: str, network: Network, tmp_path: Path
) -> None:
    """LoRA comes last and without the daemon that its nodes name: their client processes do the work themselves."""
    found, _, link = network
    settings = [*SMALL, *METHODS[method]]
    loopback = compose_run([*settings, "runtime=loopback"]).config
    run_experiment(loopback, settings, str(tmp_path / "loopback"))
    deployed = [*settings, *ON_THE_NETWORK]
    config = replace(compose_run(deployed).config, out_dir=str(tmp_path / "deployed"))
    if method == "fedlora":
        found.processes["daemon"].terminate()
        assert found.processes["daemon"].wait(60) == 0
        assert not found.socket.exists()
    run_experiment(config, deployed, config.out_dir, link)
    (here, ours), (there, theirs) = final(tmp_path / "loopback"), final(tmp_path / "deployed")
    assert there["accuracy"] == here["accuracy"]
    assert there["loss"] == pytest.approx(here["loss"], abs=TOLERANCE)
    assert there["dropped_replies"] == 0
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, atol=TOLERANCE, err_msg=name)
    said = [(found.folder / "logs" / f"node-{place}.log").read_text() for place in (0, 1)]
    assert [ALONE in text for text in said] == [method == "fedlora"] * 2
    assert "raised an error" not in (found.folder / "logs" / "daemon.log").read_text()


def test_deploy_runs_an_experiment_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            ["deploy", "--folder", "net", "--nodes", "2", "--daemon", *SMALL[:-1], "out_dir=run"]
        )
        == 0
    )
    assert 0 <= RunDirectory.open(tmp_path / "run").summary()["accuracy"] <= 1
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
    assert left == [], "every process has ended"
