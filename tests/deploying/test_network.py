import tomllib
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from fedllm_flwr.deploying.network import LocalNetwork, NodeFacts, connection_text, shown
from fedllm_flwr.errors import ConfigError


def test_facts_are_read_by_flower_as_they_were_meant() -> None:
    facts = NodeFacts(1, 3, data_path="/data of site/rows.jsonl", state_path="/var/state")
    assert parse_config_args([facts.text()]) == {
        "partition-id": 1,
        "num-partitions": 3,
        "data-path": "/data of site/rows.jsonl",
        "state-path": "/var/state",
    }


@pytest.mark.parametrize("path", ['/a" device="cuda', "/a\\b", "/a\nb"])
def test_a_path_that_would_be_another_fact_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="data-path: expected a path without quotes"):
        NodeFacts(0, 1, data_path=path).text()


def test_the_connection_is_a_table_of_flowers_configuration() -> None:
    table = tomllib.loads(connection_text("host:8443", Path("/etc/ca.crt")))
    assert table["superlink"]["default"] == "fedllm"
    assert table["superlink"]["fedllm"] == {
        "address": "host:8443",
        "root-certificates": "/etc/ca.crt",
    }


def test_every_part_has_its_own_port_key_and_place(tmp_path: Path) -> None:
    network = LocalNetwork(tmp_path, 3, data_path="/data/{node}.csv")
    superlink, *rest = network.commands()
    registrations, nodes = rest[:3], rest[3:]
    assert superlink[0] == "flower-superlink"
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in shown(superlink)
    assert len({command[3] for command in registrations}) == 3
    for name in ("--port", "--auth-supernode-private-key", "--node-config"):
        assert len({node[node.index(name) + 1] for node in nodes}) == 3, name
    assert 'data-path="/data/2.csv"' in nodes[2][-1]
    assert network.commands() == network.commands(), "what is shown is what is run"
    assert list(tmp_path.iterdir()) == [], "nothing is written before it is started"


def test_nodes_that_ask_a_daemon_name_the_one_that_is_started(tmp_path: Path) -> None:
    network = LocalNetwork(tmp_path, 3, asking=2)
    (daemon,) = [command for command in network.commands() if command[:2] == ["fedllm", "daemon"]]
    sockets = [network.facts(place).daemon_socket for place in network.places()]
    assert sockets == [daemon[-1], daemon[-1], ""]
    facts = parse_config_args([network.facts(0).text()])
    assert facts["daemon-socket"] == daemon[-1]
    assert "daemon-socket" not in parse_config_args([network.facts(2).text()])
    assert not any("daemon" in command for command in LocalNetwork(tmp_path, 3).commands())


def test_files_are_found_from_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = LocalNetwork(Path("net"), 2, data_path="data/{node}.csv", model_path="{odd}/model")
    monkeypatch.chdir("/")
    facts = network.facts(1)
    assert facts.data_path == str(tmp_path / "data/1.csv"), "a node runs in another folder"
    assert facts.model_path == str(tmp_path / "{odd}/model"), "other braces are the path's own"
    assert facts.state_path == str(tmp_path / "net/state/1")
    assert LocalNetwork(tmp_path, 1).facts(0).data_path == ""


def test_a_network_without_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nodes: expected >= 1, got 0"):
        LocalNetwork(tmp_path, 0)
