from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.actions import run_experiment
from fedllm_flwr.core import run as run_core
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.sharding import members_of, shard_config, shard_folder

Fixture = Callable[..., Any]
SHARDS = ("unlearning=shards", "method.sharing=b_only", "num_rounds=2")


def test_a_shards_settings_do_not_depend_on_who_is_in_the_others(micro: Fixture) -> None:
    config = micro(*SHARDS)
    members = members_of(config)
    assert sorted(p for clients in members.values() for p in clients) == [0, 1, 2, 3]
    assert len(members) == 2
    first, second = sorted(members)
    leaving = members[first][0]
    without = micro(*SHARDS, f"unlearning.removed=[{leaving}]")
    assert shard_config(without, second).fingerprint() == shard_config(config, second).fingerprint()
    if len(members[first]) > 1:
        assert (
            shard_config(without, first).fingerprint() != shard_config(config, first).fingerprint()
        )
    assert set(shard_config(config, first).unlearning.removed) == set(members[second])


@pytest.fixture(scope="module")
def sharded(micro: Fixture, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("sharded") / "run"
    run_experiment(micro(*SHARDS), [], str(folder))
    return RunDirectory.open(folder)


def adapter(path: Any) -> np.ndarray:
    found = checkpoints.latest(path / "checkpoints")
    assert found is not None
    return found.arrays["adapter"]


def test_the_model_is_the_mean_of_the_shards(sharded: RunDirectory, micro: Fixture) -> None:
    models = [adapter(shard_folder(sharded.path, shard)) for shard in members_of(micro(*SHARDS))]
    np.testing.assert_allclose(adapter(sharded.path), np.mean(models, axis=0), atol=1e-7)
    assert np.abs(models[0] - models[1]).max() > 1e-3


def test_the_whole_run_has_the_bytes_and_the_clients_of_its_shards(
    sharded: RunDirectory, micro: Fixture
) -> None:
    trained = {(r["round"], r["partition_id"]) for r in sharded.records("client")}
    assert trained == {(r, p) for r in (1, 2) for p in range(4)}
    own = [RunDirectory.open(shard_folder(sharded.path, s)) for s in members_of(micro(*SHARDS))]
    assert sharded.summary()["uplink_bytes"] == sum(run.summary()["uplink_bytes"] for run in own)
    assert 0 <= sharded.summary()["accuracy"] <= 1


def test_a_killed_run_goes_on_with_the_shards_that_are_left(
    sharded: RunDirectory, micro: Fixture, edge_grid: Fixture
) -> None:
    sha, config = sharded.summary()["adapter_sha256"], micro(*SHARDS)
    last = max(members_of(config))
    (sharded.path / "summary.json").unlink()
    import shutil

    shutil.rmtree(sharded.checkpoints)
    shutil.rmtree(shard_folder(sharded.path, last))
    grid = edge_grid(2)
    assert run_core(grid, config, sharded.path)["adapter_sha256"] == sha
    asked = [b for b in map(_body, grid.sent) if "learning-rate" in b]
    assert {p for b in asked for p in b["partition-ids"]} == set(members_of(config)[last])
    assert len(sharded.records("client")) == 8, "each is there once"


def _body(message: Any) -> dict[str, Any]:
    from fedllm_flwr import records

    found: dict[str, Any] = records.read_body(message)
    return found
