"""Cheap messages and differential privacy for rows of whole matrices."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import records
from fedllm_flwr.costs import codec_bytes
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.packing import indices_of, pack
from strategies import build_strategy

Fixture = Callable[..., Any]
ROWS = ("method=fedgrass", "method.rule=uniform_nr", "strategy.weighting=uniform")
ONE = (*ROWS, "num_rounds=1", "evaluate_every=1")
NOISELESS = ("privacy.noise_multiplier=0", "privacy.clip_norm=1e30")
QUIET = ("wire.error_feedback=false",)
TRAINERS = {
    "shared": (),
    "dense": ("method.trainer=dense", "method.rank=8", "method.rule=norm_nr"),
    "galore": ("method.trainer=galore", "method.rule=norm_nr"),
}


def rows_sent(played: Any) -> dict[str, np.ndarray]:
    """What clients have sent in the last exchange, by client and in the order of clients."""
    found: dict[str, np.ndarray] = {}
    for reply in played.grid.replies:
        if reply.metadata.message_type.startswith("train"):
            found |= records.read(reply, records.ANSWER)[1]
    return dict(sorted(found.items()))


@pytest.mark.parametrize(("codec", "sharing"), [("int8", "shared"), ("int4", "local")])
def test_quantised_rows_have_the_bytes_of_the_formula_both_ways(
    codec: str, sharing: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid(4)
    wire = (f"wire={codec}", f"wire.downlink={codec}", *QUIET)
    played = play(micro(*ROWS, *wire, f"method.sharing={sharing}", "num_rounds=2"), grid=grid)
    strategy = played.strategy
    rows = [(4, n) for n in strategy.columns.values()]
    up = [
        m.content[records.ARRAYS]["flat"].numpy().nbytes
        for m in grid.replies
        if m.metadata.message_type == records.TRAIN
    ]
    assert up == [codec_bytes(rows)[codec]] * 8
    for message in grid.sent:
        body = records.read_body(message)
        if message.metadata.message_type != records.TRAIN or body["server-round"] != 2:
            continue
        [[name, size]] = json.loads(message.content["instruction"]["parts"])
        changed = [
            (len(indices_of(body["changed"][layer], rows, layer)), strategy.columns[layer])
            for layer, rows in strategy.heights.items()
        ]
        assert (name, size) == ("state", codec_bytes(changed)[codec])


def test_quantised_rows_move_the_model_almost_as_float32_does_and_lose_nothing_on_the_way_down(
    micro: Fixture, play: Fixture
) -> None:
    plain = play(micro(*ROWS)).strategy
    for codec, bound in (("int8", 0.02), ("int4", 0.35)):
        both = play(micro(*ROWS, f"wire={codec}", f"wire.downlink={codec}", *QUIET)).strategy
        assert list(both.changed) == list(plain.changed)
        wanted, found = pack(plain.changed), pack(both.changed)
        assert 0 < np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted)


def test_the_server_adds_changes_to_its_own_rows_and_not_to_what_it_sent(
    micro: Fixture, play: Fixture
) -> None:
    """A client that changes nothing leaves rows as they are, however coarse the way down."""
    still = (*ROWS, "optimizer=sgd", "optimizer.learning_rate=1e-30", "method.refresh_rounds=9")
    played = play(micro(*still, "num_rounds=1", "evaluate_every=1"))
    strategy = played.strategy
    rough = np.random.default_rng(0).normal(size=pack(strategy.changed).size).astype(np.float32)
    start = 0
    for _, update in sorted(strategy.changed.items()):
        size = update.values.size
        update.values[:] = rough[start : start + size].reshape(update.values.shape)
        start += size
    config = micro(*still, "wire.downlink=int4", "num_rounds=2", "evaluate_every=2")
    other = build_strategy(config, strategy.hosting, strategy.observer, task_kind="classification")
    other.restore(strategy.checkpoint(1))
    other.run = strategy.run
    other._train_until_enough(played.grid, 2, 60.0)
    np.testing.assert_allclose(pack(other.changed), rough, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_central_noise_of_zero_is_the_plain_mean_bit_for_bit(
    trainer: str, micro: Fixture, play: Fixture
) -> None:
    plain = play(micro(*ONE, *TRAINERS[trainer]))
    free = play(micro(*ONE, *TRAINERS[trainer], "privacy=central", *NOISELESS))
    assert free.sha == plain.sha
    assert np.abs(pack(free.strategy.changed)).max() > 1e-4


def test_rows_are_clipped_together_and_noised_once_a_round(micro: Fixture, play: Fixture) -> None:
    central = (*ONE, "privacy=central", "privacy.clip_norm=0.05")
    silent = play(micro(*central, "privacy.noise_multiplier=0"))
    updates = list(rows_sent(silent).values())
    assert len(updates) == 4
    norms = [float(np.linalg.norm(u.astype(np.float64))) for u in updates]
    assert max(norms) > 0.05
    clipped = [u * min(1, 0.05 / n) for u, n in zip(updates, norms, strict=True)]
    np.testing.assert_allclose(pack(silent.strategy.changed), sum(clipped) / 4, rtol=0, atol=1e-7)
    noised = play(micro(*central, "privacy.reproducible_noise=true"))
    noise = pack(noised.strategy.changed) - pack(silent.strategy.changed)
    # σ C / m on every value; the bounds hold for all but one of 10^6 seeds
    deviation = 0.05 / 4
    assert abs(noise.std() / deviation - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5 * deviation / np.sqrt(noise.size)
    assert noised.run.records("privacy")[-1]["epsilon"] > 0


@pytest.mark.parametrize(
    ("sharing", "wire"), [("shared", ("wire=int8", *QUIET)), ("local", ("wire=float32",))]
)
def test_a_client_noises_its_own_rows_before_they_are_encoded(
    sharing: str, wire: tuple[str, ...], micro: Fixture, play: Fixture
) -> None:
    own = (*ONE, f"method.sharing={sharing}", *wire)
    plain = play(micro(*own))
    free = play(micro(*own, "privacy=local", *NOISELESS))
    assert free.sha == plain.sha
    noised = play(micro(*own, "privacy=local", "privacy.clip_norm=0.05"))
    assert noised.run.records("failure") == []
    values = pack(noised.strategy.changed)
    # of four clients, each row has the noise of those that changed it
    assert 0.05 / 4 * 0.8 < values.std() < 0.05 / 2 * 1.2


def test_values_of_clients_with_rows_of_their_own_are_no_one_set(
    micro: Fixture, play: Fixture
) -> None:
    for overrides in (("method.sharing=local",), ("method.rule=norm_nr",)):
        strategy = play(micro(*ONE, *overrides)).strategy
        with pytest.raises(ConfigError, match="its replies are not one set of values"):
            strategy.start_values(2)
