"""What docs/deployment.md says of proxies, signed apps and backups, done with a real SuperLink."""

import contextlib
import json
import re
import shutil
import sqlite3
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedllm_flwr
from fedllm_flwr.deploying.network import HOST
from fedllm_flwr.launch import CONNECTION
from fedllm_flwr.processes import free_port, wait_for_port

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]
needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
LISTED = ("supernode", "list", CONNECTION, "--format", "json")
TINY = (
    "experiment=smoke", "num_rounds=1", "baselines=none", "partition=iid", "partition.num_clients=2",
    "task.train_rows=16", "task.validation_rows=4", "task.test_rows=8", "client.local_epochs=0",
    "client.local_steps=1", "client.batch_size=4", "runtime.device=cpu", "runtime.dtype=float32",
)  # fmt: skip
PAGE = (Path(fedllm_flwr.__file__).parents[1] / "docs" / "deployment.md").read_text()


def proxy_configuration(federation: Any, port: int) -> str:
    """The page's server block with this network's ports, files and name, in what nginx needs around it."""
    (block,) = re.findall(r"```nginx\n(.*?)```", PAGE, re.S)
    files = federation.files
    for printed, here in {
        "listen 8443 ssl": f"listen {HOST}:{port} ssl",
        "superlink.example.org": "localhost",
        "127.0.0.1:8000": federation.network.address,
        "/etc/fedllm/server.pem": str(files.certificate),
        "/etc/fedllm/server.key": str(files.key),
        "/etc/fedllm/ca.crt": str(files.authority),
    }.items():
        assert printed in block, printed
        block = block.replace(printed, here)
    folder = federation.folder
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    bodies = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    return (
        f"daemon off; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {bodies}\n{block}}}\n"
    )


@pytest.fixture(scope="module")
def proxied(federation_of: Any) -> Iterator[tuple[Any, str]]:
    """A SuperLink behind the proxy, with a daemon for its node, and the proxy's address."""
    with federation_of(1) as found:
        found.start_daemon()
        port = free_port()
        path = found.folder / "nginx.conf"
        path.write_text(proxy_configuration(found, port))
        process = found.start("nginx", ["nginx", "-c", str(path), "-p", str(found.folder)])
        wait_for_port(port, process, found.log("nginx"))
        yield found, f"localhost:{port}"


def status(federation: Any, url: str) -> int:
    """What a POST without a body is answered with."""
    trusted = ssl.create_default_context(cafile=str(federation.files.authority))
    asked = urllib.request.Request(url, data=b"", method="POST")  # noqa: S310  # https, and ours
    try:
        with urllib.request.urlopen(asked, context=trusted, timeout=60) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@needs_nginx
def test_nodes_join_through_the_proxy_and_strangers_reach_nothing_else(
    proxied: tuple[Any, str],
) -> None:
    federation, proxy = proxied
    control = "v1/control/list-runs"
    assert status(federation, f"https://{federation.network.address}/{control}") != 404
    for path in (control, "v1/runtime/pull-task", "health", "", "v1/fleet/../control/list-runs"):
        assert status(federation, f"https://{proxy}/{path}") == 404, path
    federation.start_node(0, through=proxy)
    federation.until("the node to be online", lambda: "online" in federation.flwr(*LISTED))


@needs_nginx
def test_a_run_goes_through_the_proxy_and_flower_tells_of_it_what_its_status_tells(
    proxied: tuple[Any, str], tmp_path: Path
) -> None:
    federation, proxy = proxied
    if "node-0" not in federation.parts:
        federation.start_node(0, through=proxy)
    submitted = federation.run(tmp_path / "run", *TINY)
    run = submitted.ended()
    status = json.loads(federation.fedllm("action=status", f"run={run.path}"))
    assert (status["state"], status["round"], status["dropped_replies"]) == ("finished", 1, 0)
    (run_id,) = [n for n, word in federation.runs().items() if word == "finished:completed"]
    log = federation.flwr("log", run_id, CONNECTION, "--show")
    assert "round 1 of 1: 2 of 2 clients answered" in log
    (accuracy,) = re.findall(r"finished: accuracy ([\d.]+)", log)
    assert float(accuracy) == pytest.approx(status["accuracy"], abs=5e-4)
    assert "raised an error" not in federation.log("daemon").read_text()


def test_a_node_that_trusts_only_signed_apps_refuses_ours_and_is_named(
    federation_of: Any, tmp_path: Path
) -> None:
    """Flower takes signatures from its Hub alone, so that such a node takes part in no run of a folder's app."""
    with federation_of(1) as federation:
        keys = tmp_path / "keys.yaml"
        signer = tmp_path / "signer"
        make = ["ssh-keygen", "-t", "ed25519", "-N", "", "-q", "-f", str(signer)]
        subprocess.run(make, check=True)
        keys.write_text(f"signer: {signer.with_suffix('.pub').read_text()}")
        federation.start_node(0, "--trusted-entities", str(keys))
        federation.until("the node to be online", lambda: "online" in federation.flwr(*LISTED))
        submitted = federation.run(tmp_path / "run", *TINY, "runtime.node_wait_seconds=5")
        submitted.ended(3)
        assert "a node did not say who it is: The FAB could not be verified." in submitted.said()


@needs_nginx
@pytest.mark.skipif(not shutil.which("sqlite3"), reason="sqlite3 is not installed")
def test_a_backup_that_was_made_while_it_ran_knows_the_nodes(proxied: tuple[Any, str]) -> None:
    federation, _ = proxied
    (command,) = re.findall(r"`(sqlite3 state\.db [^`]*)`", PAGE)
    subprocess.run(["bash", "-c", command], cwd=federation.folder, check=True)
    with contextlib.closing(sqlite3.connect(federation.folder / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    (node,) = json.loads(federation.flwr(*LISTED))["nodes"]
    federation.kill("superlink")
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (federation.folder / name).unlink(missing_ok=True)
    shutil.copy(federation.folder / "copy.db", federation.folder / "state.db")
    federation.start_superlink()
    (again,) = json.loads(federation.flwr(*LISTED))["nodes"]
    assert again["node-id"] == node["node-id"]
