import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from clients.workspace import open_workspace, read
from fedllm_flwr import records
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import AssetError, ConfigError, DataError, WireError
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE

Fixture = Callable[..., Any]


@pytest.fixture
def asking(edge_grid: Fixture) -> Callable[..., Message]:
    """A training message for a configuration."""
    edge_grid(1)  # gives messages the identity of a run

    def make(config: Any, *partition_ids: int, **changes: Any) -> Message:
        body = {"config": json.loads(config.to_json()), "fingerprint": config.fingerprint(),
                "partition-ids": list(partition_ids), **changes}  # fmt: skip
        return Message(records.instruction(body, {}, "float32"), 1000, records.TRAIN)

    return make


def node(place: int = 0, total: int = 1, **facts: str) -> Context:
    config = {"partition-id": place, "num-partitions": total} | {
        k.replace("_", "-"): v for k, v in facts.items()
    }
    return Context(run_id=1, node_id=1000, node_config=config, state=RecordDict(), run_config={})  # type: ignore[arg-type]


def test_a_message_opens_the_workspace_that_it_describes(micro: Fixture, asking: Fixture) -> None:
    config = micro()
    asked = read(asking(config, 1, 3), node(1, 2))
    assert asked.partition_ids == [1, 3]
    assert asked.parts == {}
    assert asked.work.config == config
    assert asked.work.task.name == "synthetic"
    assert [c.partition_id for c in asked.work.clients] == [0, 1, 2, 3]
    assert {shape.name.rpartition(".")[2] for shape in asked.work.shapes} == {"q_proj", "v_proj"}


def test_the_same_message_opens_the_same_workspace(micro: Fixture, asking: Fixture) -> None:
    config = micro()
    assert read(asking(config, 0), node()).work is read(asking(config, 2), node()).work


def test_a_seed_of_the_data_keeps_the_rows_and_leaves_the_training_its_own_draws(
    micro: Fixture, play: Fixture
) -> None:
    def rows(*overrides: str) -> list[Any]:
        work = open_workspace(whole_json(micro(*overrides)))
        return [(c.train, c.validation, c.test) for c in work.clients]

    assert rows("seed=1", "data_seed=0") == rows("seed=0") == rows("seed=0", "data_seed=0")
    assert rows("seed=1") != rows("seed=0")
    short = ("num_rounds=1", "data_seed=0")
    same, other = play(micro("num_rounds=1")), play(micro(*short, "seed=1"))
    assert same.sha == play(micro(*short)).sha != other.sha


def test_runs_that_differ_in_a_rate_share_backbone_and_tokens(micro: Fixture) -> None:
    one, two = (
        open_workspace(whole_json(micro(f"optimizer.learning_rate={rate}")))
        for rate in (0.01, 0.02)
    )
    assert one is not two
    assert one.backbone is two.backbone
    assert one.encoder() is two.encoder()
    assert one.encoded(2, "train")[0] is two.encoded(2, "train")[0]
    assert one.encoder("about") is not one.encoder("topic")


def test_all_rows_together_are_every_clients_rows(micro: Fixture) -> None:
    work = open_workspace(whole_json(micro()))
    together = work.rows(records.POOLED)
    for split, count in (("train", 36), ("validation", 12), ("test", 12)):
        parts = [row.row_id for client in work.clients for row in getattr(client, split)]
        pooled = [row.row_id for row in getattr(together, split)]
        assert pooled == parts
        assert len(set(pooled)) == count
    assert len(work.encoded(records.POOLED, "train")) == 36
    assert work.rows(2) is work.clients[2]


def test_every_process_gets_the_same_partition(micro: Fixture) -> None:
    def ids() -> list[list[str]]:
        open_workspace.cache_clear()
        work = open_workspace(whole_json(micro()))
        return [[row.row_id for row in client.train] for client in work.clients]

    assert ids() == ids()


def test_a_node_serves_only_its_own_clients(micro: Fixture, asking: Fixture) -> None:
    config = micro()
    with pytest.raises(
        WireError, match="node with partition-id 0 of 2: asked for client 1, which it does not host"
    ):
        read(asking(config, 0, 1), node(0, 2))
    with pytest.raises(WireError, match="there are 4 clients: asked for client 4"):
        read(asking(config, 4), node())
    assert read(asking(config, records.POOLED), node(1, 2)).partition_ids == [-1]


def test_a_fingerprint_that_does_not_fit_shows_both(micro: Fixture, asking: Fixture) -> None:
    own, other = micro().fingerprint(), "f" * 16
    with pytest.raises(WireError, match=f"reads the configuration as {own}, the server as {other}"):
        read(asking(micro(), 0, fingerprint=other), node())


def test_another_version_shows_both(micro: Fixture, asking: Fixture) -> None:
    message = asking(micro(), 0)
    message.content[records.INSTRUCTION]["package-version"] = "3.2.1"
    with pytest.raises(WireError, match=r"this side runs 0\.\S+, the other side 3\.2\.1"):
        read(message, node())


def test_the_nodes_own_device_wins(micro: Fixture, asking: Fixture) -> None:
    assert read(asking(micro(), 0), node(device="cpu")).work.config.runtime.device == "cpu"
    with pytest.raises(ConfigError, match="device 'cuda:9' is not present; this machine has cpu"):
        read(asking(micro(), 0), node(device="cuda:9"))


@pytest.fixture
def csv_config(micro: Fixture) -> Any:
    return micro("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
                 "partition=iid", "partition.num_clients=2")  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    path.write_text(
        "text,label\n" + "".join(f"row {n},{'no' if n % 3 else 'yes'}\n" for n in range(40))
    )
    return path


def test_data_comes_from_the_node_and_first_from_its_own_config(
    csv_config: Any, asking: Fixture, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="data_path"):
        read(asking(csv_config, 0), node())
    monkeypatch.setenv(DATA_PATH_VARIABLE, str(file))
    assert read(asking(csv_config, 0), node()).work.config.runtime.data_path == str(file)
    with pytest.raises(DataError):
        read(asking(csv_config, 0), node(data_path=str(tmp_path / "absent.csv")))


def test_a_message_cannot_name_a_file(csv_config: Any, asking: Fixture, file: Path) -> None:
    message = asking(csv_config, 0)
    body = json.loads(message.content[records.INSTRUCTION]["body"])
    body["config"]["runtime"]["data_path"] = str(file)
    message.content[records.INSTRUCTION]["body"] = json.dumps(body)
    with pytest.raises(ConfigError, match="data_path"):
        read(message, node())


def test_what_is_wrong_with_the_data_stays_in_the_nodes_log(
    csv_config: Any, asking: Fixture, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(file.read_text() + "a secret\n")
    with pytest.raises(DataError) as caught:
        read(asking(csv_config, 0), node(data_path=str(file)))
    assert str(caught.value) == "this node cannot use its data; its own log says why"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "own.csv, line 42" in caplog.text


@pytest.mark.parametrize(
    "method",
    [("method=fedlora",), ("method=fedresprompt", "method.server_model=lm")],
    ids=["fedlora", "fedresprompt"],
)
def test_where_a_nodes_model_lies_is_the_nodes_own(
    method: tuple[str, ...],
    micro: Fixture,
    asking: Fixture,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = micro(*method, "model=path")
    with pytest.raises(AssetError, match="this node cannot read its model") as caught:
        read(asking(config, 0), node(model_path=str(tmp_path / "hospital-7")))
    assert "hospital-7" not in str(caught.value)
    assert "hospital-7" in caplog.text


def test_each_message_computes_with_its_own_runs_threads(micro: Fixture, asking: Fixture) -> None:
    """Runs take turns in a process that lives long, and a workspace that is kept is opened once."""
    for threads in (1, 2, 1):
        read(asking(micro(f"runtime.threads={threads}"), 0), node())
        assert torch.get_num_threads() == threads
