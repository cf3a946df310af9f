"""Federated full-weight training over real messages; what holds of every strategy is in the contracts."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.training.full import row_norms, train_full
from fedllm_flwr.training.full_job import FullJob, FullSettings
from fedllm_flwr.training.settings import LocalSettings

Fixture = Callable[..., Any]
ONE_STEP = (
    "method=fedgrass", "optimizer=sgd", "optimizer.learning_rate=0.3", "client.local_steps=1", "client.batch_size=64",
    "num_rounds=1", "evaluate_every=1",
)  # fmt: skip
"""Every client makes one step of SGD on all of its rows."""


def pooled_step(config: RunConfig, rows: Any) -> dict[str, RowUpdate]:
    """One step of plain or projected SGD on all clients' rows in one place."""
    work = open_workspace(whole_json(config))
    local = LocalSettings(batch_size=1000, local_steps=1, learning_rate=0.3, optimizer="sgd")
    job = FullJob(
        records.POOLED, work.encoded(records.POOLED, "train"), config.method.target_modules, 0, {}, rows
    )  # fmt: skip
    settings = FullSettings(local=local, projection=config.method.projection())
    result = train_full(work.backbone, job, settings, head_token_ids=work.encoder().head_token_ids)
    assert not result.error
    return result.updates


def assert_same_rows(found: dict[str, RowUpdate], expected: dict[str, RowUpdate]) -> None:
    assert list(found) == list(expected)
    for name, update in expected.items():
        np.testing.assert_array_equal(found[name].indices, update.indices)
        np.testing.assert_allclose(found[name].values, update.values, rtol=0, atol=1e-6)
        assert np.abs(update.values).max() > 1e-4, "a step that could be told from none"


@pytest.mark.parametrize("rule", ["norm_nr", "norm2_r", "top_r", "uniform_r", "frozen_pass"])
def test_one_shared_step_is_the_step_on_all_rows_in_one_place(
    rule: str, micro: Fixture, play: Fixture
) -> None:
    config = micro(*ONE_STEP, f"method.rule={rule}", "method.scale=0.5")
    strategy = play(config).strategy
    assert all(1 <= len(rows.indices) <= 4 for rows in strategy.chosen.values())
    assert_same_rows(strategy.changed, pooled_step(config, strategy.chosen))


def test_one_dense_step_is_the_step_on_all_rows_in_one_place(micro: Fixture, play: Fixture) -> None:
    config = micro(*ONE_STEP, "method.trainer=dense", "method.rank=8")
    strategy = play(config).strategy
    assert_same_rows(strategy.changed, pooled_step(config, None))


def test_local_rows_are_a_mean_over_all_clients_or_over_those_that_changed_them(
    micro: Fixture, play: Fixture
) -> None:
    local = (*ONE_STEP, "method.sharing=local", "method.rank=8", "method.rule=norm_nr")
    by_clients = play(micro(*local)).strategy
    by_counts = play(micro(*local, "method.row_average=counts")).strategy
    config = micro(*local)
    dense = pooled_step(micro(*ONE_STEP, "method.trainer=dense", "method.rank=8"), None)
    sizes = [len(c.train) for c in open_workspace(whole_json(config)).clients]
    for name, update in by_clients.changed.items():
        np.testing.assert_array_equal(update.indices, by_counts.changed[name].indices)
        rows = update.values, by_counts.changed[name].values
        shares = np.linalg.norm(rows[0], axis=1) / np.linalg.norm(rows[1], axis=1)
        # a share is the weight of some of the clients over the weight of all
        possible = {
            sum(s for i, s in enumerate(sizes) if bits >> i & 1) / sum(sizes)
            for bits in range(1, 16)
        }
        assert all(min(abs(share - p) for p in possible) < 1e-5 for share in shares)
        everyone = np.isclose(shares, 1, atol=1e-6)
        np.testing.assert_allclose(
            update.values[everyone], dense[name].values[update.indices[everyone]], rtol=0, atol=1e-6
        )
        assert (~everyone).any()


def test_rows_are_picked_by_the_mean_of_the_clients_norms(micro: Fixture, play: Fixture) -> None:
    config = micro(*ONE_STEP, "method.rule=top_r")
    work = open_workspace(whole_json(config))
    total: dict[str, np.ndarray] = {}
    for client in work.clients:
        rows = work.encoded(client.partition_id, "train")
        found = row_norms(
            work.backbone, rows, config.method.target_modules, rule="top_r",
            head_token_ids=work.encoder().head_token_ids,
        )  # fmt: skip
        for name, norms in found.items():
            total[name] = total.get(name, 0) + len(rows) * norms
    for name, rows in play(config).strategy.chosen.items():
        assert set(rows.indices) == set(np.argsort(-total[name])[:4])


def test_rows_stay_for_as_many_rounds_as_asked(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid(2)
    strategy = play(micro("method=fedgrass", "method.refresh_rounds=2"), grid=grid).strategy
    stages = [
        (body["server-round"], body["stage"])
        for m in grid.sent if m.metadata.message_type.startswith("train")
        for body in [records.read_body(m)]
    ]  # fmt: skip
    assert sorted(set(stages)) == [
        (1, "norms"),
        (1, "train"),
        (2, "train"),
        (3, "norms"),
        (3, "train"),
    ]
    for name, rows in strategy.chosen.items():
        assert set(rows.indices) <= set(strategy.changed[name].indices)
        assert len(strategy.changed[name].indices) <= 2 * 4


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharing", ["shared", "local"])
def test_rows_cost_what_the_formula_says(
    codec: str, sharing: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid(4)
    config = micro(
        "method=fedgrass",
        f"wire={codec}",
        f"method.sharing={sharing}",
        "num_rounds=1",
        "evaluate_every=1",
    )
    strategy = play(config, grid=grid).strategy
    width = 4 if codec == "float32" else 2
    replies = [r for r in grid.replies if r.metadata.message_type.startswith("train")]
    sizes = [sum(a.numpy().nbytes for a in r.content[records.ARRAYS].values()) for r in replies]
    rows = width * sum(4 * n for n in strategy.columns.values())
    norms = [4 * sum(strategy.heights.values())] * 4 if sharing == "shared" else []
    assert sizes == [*norms, *[rows] * 4]


def test_half_precision_moves_the_model_almost_as_float32_does(
    micro: Fixture, play: Fixture
) -> None:
    plain = play(micro("method=fedgrass", "method.rule=uniform_nr")).strategy
    half = play(micro("method=fedgrass", "method.rule=uniform_nr", "wire=float16")).strategy
    for name, update in plain.changed.items():
        largest = np.abs(update.values).max()
        difference = np.abs(half.changed[name].values - update.values).max()
        assert 0 < difference < 0.05 * largest


@pytest.mark.parametrize(
    ("refresh_steps", "most"), [(1, 8), (2, 4), (3, 4)]
)  # of the two steps that a client makes
def test_rows_of_every_choice_in_a_round_are_taken(
    refresh_steps: int, most: int, micro: Fixture, play: Fixture
) -> None:
    steps = f"method.refresh_steps={refresh_steps}"
    config = micro(
        "method=fedgrass", "method.sharing=local", "method.rule=uniform_nr", "num_rounds=1", steps
    )
    played = play(config)
    assert played.run.records("failure") == []
    layers = len(played.strategy.heights)
    sent = [c["rows"] for c in played.run.records("client")]
    assert max(sent) <= layers * most
    assert (max(sent) > layers * 4) == (refresh_steps == 1)


def test_with_epochs_the_steps_are_those_that_a_client_tells(micro: Fixture, play: Fixture) -> None:
    epochs = ("client.local_steps=0", "client.local_epochs=2", "method.refresh_steps=1")
    played = play(micro("method=fedgrass", "method.sharing=local", "num_rounds=1", *epochs))
    assert played.run.records("failure") == []
    assert max(c["steps"] for c in played.run.records("client")) > 2


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("method.rank=33",), r"method\.rank, layer \S+v_proj: .* from 1 to its 32 rows, got 33"),
        (
            ("method.rank=33", "method.trainer=galore"),
            r"method\.rank, layer \S+v_proj: .* from 1 to its 32 rows, got 33",
        ),
    ],
)
def test_a_rank_that_a_matrix_does_not_have_is_refused_at_the_start(
    overrides: tuple[str, ...], reason: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid(2)
    with pytest.raises(ConfigError, match=reason):
        play(micro("method=fedgrass", *overrides), grid=grid)
    assert not [m for m in grid.sent if not m.metadata.message_type.startswith("query")]


def test_eight_bits_without_their_package_are_refused_at_the_start(
    micro: Fixture, play: Fixture
) -> None:
    config = micro("method=fedgrass", "method.eight_bit=true", "num_rounds=1")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match="expected the package bitsandbytes"):
            play(config)
    else:
        assert play(config).run.records("failure") == []
