"""Federated full-weight training over real messages; what holds of every strategy is in the contracts."""

import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.packing import bitmap, indices_of
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


VICTIM = 1


def change_rows(key: str, value: Any) -> Callable[..., None]:
    def change(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        first = sorted(infos[0]["rows"])[0]
        infos[0]["rows"][first] = value(infos[0]["rows"][first]) if callable(value) else value
        if key == "drop":
            infos[0]["rows"].pop(first)

    return change


def in_part(place: int, value: float) -> Callable[..., None]:
    def change(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        parts[f"{VICTIM}/rows"][place] = value

    return change


def shorter(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
    parts[f"{VICTIM}/rows"] = parts[f"{VICTIM}/rows"][:-1]


def saying(name: str, value: Any) -> Callable[..., None]:
    return lambda infos, parts: infos[0].update({name: value})


def one_more_row(text: str) -> str:
    rows = indices_of(text, 64, "test")
    other = np.setdiff1d(np.arange(64), rows)[0]
    return bitmap(np.append(rows, other), 64)


def one_row_less(text: str) -> str:
    return bitmap(indices_of(text, 64, "test")[1:], 64)


LOCAL_FAULTS = {
    "no bitmap": (change_rows("set", "§§"), r"client 1, layer model\S+q_proj: expected a bitmap of 64 rows, got '§§'"),
    "a number": (change_rows("set", 7), "expected a bitmap of 64 rows, got 7"),
    "too few rows": (change_rows("set", bitmap(np.arange(4), 8)), "expected a bitmap of 64 rows, got 8 bits"),
    "rows beyond the matrix": (change_rows("set", bitmap(np.array([70]), 72)), "64 rows, got 72 bits"),
    "values without a row": (change_rows("set", one_row_less), r"part rows: expected \d+ values, got \d+"),
    "more rows than it could train": (
        change_rows("set", one_more_row), r"client 1, layer model\S+q_proj: expected at most 4 rows of 2 steps, got 5"
    ),
    "a layer is missing": (change_rows("drop", ""), "client 1, rows: expected those of 4 layers"),
    "no rows": (saying("rows", None), "client 1, rows: expected those of 4 layers, got None"),
}  # fmt: skip
FAULTS = {
    "not finite": (in_part(0, math.nan), "client 1, part rows: expected finite values"),
    "infinite": (in_part(-1, math.inf), "client 1, part rows: expected finite values"),
    "too short": (shorter, r"client 1, part rows: expected \d+ values, got \d+"),
    "no examples": (saying("num-examples", 0), "client 1: weight: expected .* above 0"),
    "loss is no number": (saying("loss", math.nan), "client 1: loss: expected a finite number"),
    "its own error": (saying("error", "client 1: no rows"), "client 1: no rows"),
}


def spoiling(edge_grid: Fixture, change: Callable[..., None], stage: str) -> Any:
    """Four nodes; the victim's replies of one stage are changed."""

    def tamper(asked: list[Message], replies: list[Message]) -> list[Message]:
        for message in asked:
            body = records.read_body(message)
            if body.get("stage") != stage or body["partition-ids"] != [VICTIM]:
                continue
            wanted = message.metadata.message_id
            [reply] = [r for r in replies if r.metadata.reply_to_message_id == wanted]
            told, parts = records.read(reply, records.ANSWER)
            parts = {name: values.copy() for name, values in parts.items()}
            change(told["clients"], parts)
            reply.content = records.answer(told, parts, "float32", 1)
        return replies

    return edge_grid(4, tamper)


@pytest.mark.parametrize(
    ("sharing", "fault"),
    [*(("shared", f) for f in FAULTS), *(("local", f) for f in LOCAL_FAULTS | {"too short": ()})],
)
def test_a_bad_reply_is_dropped_and_named_and_counts_for_nothing(
    sharing: str, fault: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    change, reason = (LOCAL_FAULTS | FAULTS)[fault]
    config = micro(
        "method=fedgrass",
        f"method.sharing={sharing}",
        "num_rounds=1",
        "evaluate_every=1",
        "runtime.num_nodes=4",
    )
    played = play(config, grid=spoiling(edge_grid, change, "train"))
    (failure,) = played.run.records("failure")
    assert (failure["round"], failure["partition_id"]) == (1, VICTIM)
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert [c["partition_id"] for c in played.run.records("client")] == [0, 2, 3]
    assert all(np.isfinite(update.values).all() for update in played.strategy.changed.values())


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


NORM_FAULTS = {
    "negative": (lambda infos, parts: parts["1/norms"].__setitem__(0, -1.0), "squared norms >= 0, got -1"),
    "not finite": (lambda infos, parts: parts["1/norms"].__setitem__(0, math.nan), "expected finite values"),
    "too few": (lambda infos, parts: parts.update({"1/norms": np.ones(3, np.float32)}), "values, got 3"),
    "absent": (lambda infos, parts: parts.clear(), r"expected the parts \['norms'\], got \[\]"),
    "no examples": (saying("num-examples", -1), "client 1: weight: expected .* above 0"),
    "its own error": (saying("error", "client 1: broken"), "client 1: broken"),
}  # fmt: skip


@pytest.mark.parametrize("fault", NORM_FAULTS)
def test_bad_norms_cost_their_client_the_round_and_no_one_else(
    fault: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    change, reason = NORM_FAULTS[fault]
    config = micro("method=fedgrass", "num_rounds=1", "evaluate_every=1", "runtime.num_nodes=4")
    played = play(config, grid=spoiling(edge_grid, change, "norms"))
    (failure,) = played.run.records("failure")
    assert failure["partition_id"] == VICTIM
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert [c["partition_id"] for c in played.run.records("client")] == [0, 2, 3]


def test_a_client_whose_norms_failed_is_asked_again_with_the_rows_of_the_round(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    config = micro(
        "method=fedgrass", "num_rounds=1", "evaluate_every=1", "runtime.num_nodes=4", "strategy.max_retries=1",
        "strategy.min_fraction=1.0",
    )  # fmt: skip
    left = [1]

    def once(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        if left.pop(0) if left else 0:
            infos[0]["error"] = "client 1: broken"

    grid = spoiling(edge_grid, once, "norms")
    played = play(config, grid=grid)
    assert sorted(c["partition_id"] for c in played.run.records("client")) == [0, 1, 2, 3]
    assert played.run.records("failure")[0]["reason"] == "client 1: broken"
