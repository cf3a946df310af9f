import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import records
from fedllm_flwr.averaging import SERVER_OPTIMIZERS, dense
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.models.adapters import AdapterLayout, initial_factors
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.federation import StrategyConfig
from strategies.exchange import ClientReply
from strategies.fedlora import server_optimizer, trained_side
from strategies.observer import Checkpointed

Fixture = Callable[..., Any]


@pytest.mark.parametrize(
    ("sharing", "sides"),
    [("both", ["both"] * 4), ("b_only", ["b"] * 4), ("alternating", ["b", "a", "b", "a"])],
)
def test_sides_of_rounds(sharing: str, sides: list[str]) -> None:
    assert [trained_side(sharing, server_round) for server_round in range(1, 5)] == sides


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_zero_and_minus_one_leave_a_server_optimizer_as_it_is(name: str) -> None:
    config = StrategyConfig(name="factor_mean", server_optimizer=name)
    assert server_optimizer(config) == SERVER_OPTIMIZERS[name]()


@pytest.mark.parametrize(
    ("name", "momentum"),
    [("fedavgm", "momentum"), ("diloco", "momentum"), ("fedadam", "beta_1"), ("fedyogi", "beta_1")],
)
def test_settings_reach_the_server_optimizer(name: str, momentum: str) -> None:
    config = StrategyConfig(
        name="factor_mean", server_optimizer=name, server_learning_rate=0.25, server_momentum=0.0
    )
    optimizer = server_optimizer(config)
    assert optimizer.learning_rate == 0.25
    assert getattr(optimizer, momentum) == 0.0


@pytest.fixture
def strategy(micro: Fixture, play: Fixture) -> Callable[..., Any]:
    """A strategy before its first round (a run of one round, set back)."""

    def make(*overrides: str, **changes: Any) -> Any:
        played = play(micro(*overrides, "num_rounds=1"), **changes)
        made = played.strategy
        made.restore(checkpoint_of_start(made))
        made.begin_sum(1)
        return made

    return make


def checkpoint_of_start(strategy: Any) -> Checkpointed:
    first = strategy.layout.pack(strategy._first)
    return Checkpointed(
        0, {"adapter": first, "delta": np.zeros(0, np.float32)}, {"delta_ranks": {}}
    )


def test_the_first_adapter_is_the_seeds_and_changes_nothing(strategy: Fixture) -> None:
    made = strategy()
    seed = derive_seed(0, "lora_a", 0)
    expected = initial_factors(made.shapes, made.spec, seed)
    np.testing.assert_array_equal(made.layout.pack(made._first), made.layout.pack(expected))
    assert all(not factors.lora_b.any() for factors in made._first.values())


@pytest.mark.parametrize(
    ("overrides", "parts", "held"),
    [
        ((), {"adapter": "both"}, "both"),
        (("method.sharing=b_only",), {"adapter": "b"}, "b"),
        (("method.sharing=alternating",), {"adapter": "both"}, "both"),
        (("strategy=stack",), {}, "both"),
        (("strategy=residual",), {"adapter": "both"}, "both"),
    ],
)
def test_what_is_sent_before_anything_is_carried(
    overrides: tuple[str, ...], parts: dict[str, Any], held: str, strategy: Fixture
) -> None:
    made = strategy(*overrides)
    body, sent = made.broadcast(1, train=True)
    assert {name: values.size for name, values in sent.items()} == {
        name: AdapterLayout(made.shapes, made.spec.rank, side).size for name, side in parts.items()
    }
    assert body["side-held"] == held
    assert body["delta-ranks"] == {}


def test_the_rate_of_a_round_follows_the_schedule(micro: Fixture, play: Fixture) -> None:
    made = play(
        micro("client.schedule=linear", "client.minimum_fraction=0.5", "num_rounds=3")
    ).strategy
    rates = [made.broadcast(r, train=True)[0]["learning-rate"] for r in (1, 2, 3)]
    assert rates == pytest.approx([0.02, 0.015, 0.01])
    assert "learning-rate" not in made.broadcast(1, train=False)[0]


INFO = {
    "partition-id": 1,
    "num-examples": 5,
    "loss": 1.5,
    "steps": 2,
    "tokens": 80,
    "cpu-seconds": 0.1,
    "error": "",
}


def reply(strategy: Any, **changes: Any) -> ClientReply:
    flat = changes.pop("flat", None)
    if flat is None:
        flat = strategy.layout.pack(strategy._first) + np.float32(0.01)
    return ClientReply(
        1, INFO | {k.replace("_", "-"): v for k, v in changes.items()}, {"adapter": flat}
    )


def test_a_good_reply_becomes_a_record(strategy: Fixture) -> None:
    made = strategy()
    record = made.add_reply(reply(made), 1)
    assert record == {"kind": "client", "round": 1, "partition_id": 1, "num_examples": 5, "loss": 1.5,
                      "steps": 2, "tokens": 80, "cpu_seconds": 0.1, "rank": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_examples": 0}, r"client 1: weight: expected a number above 0 .*, got 0"),
        ({"num_examples": -3}, r"client 1: weight: .*, got -3"),
        (
            {"num_examples": 2**60},
            r"client 1: num-examples: expected a whole number, got 1152921504606846976",
        ),
        ({"num_examples": True}, "client 1: num-examples: expected a whole number, got True"),
        ({"loss": math.inf}, "client 1: loss: expected a finite number, got inf"),
        ({"loss": None}, "client 1: loss: expected a finite number, got None"),
        ({"cpu_seconds": "1"}, "client 1: cpu-seconds: expected a finite number, got '1'"),
    ],
)
def test_a_refused_reply_leaves_the_sum_as_it_was(
    changes: dict[str, Any], match: str, strategy: Fixture
) -> None:
    made = strategy()
    good = made.layout.pack(made._first) * np.float32(2)
    made.add_reply(reply(made, flat=good), 1)
    with pytest.raises(WireError, match=match):
        made.add_reply(reply(made, **changes), 1)
    made.finish_sum(1)
    np.testing.assert_array_equal(made.layout.pack(made.model.factors), good)


def test_a_reply_of_another_rank_is_refused(strategy: Fixture) -> None:
    made = strategy("method.client_ranks=[4,2]")
    expected = AdapterLayout(made.shapes, 2).size
    with pytest.raises(
        ShapeError, match=rf"client 1: expected {expected} values \(rank 2, side both\)"
    ):
        made.add_reply(reply(made), 1)


def test_a_value_that_is_not_finite_names_its_layer(strategy: Fixture) -> None:
    made = strategy()
    for number, shape in enumerate(made.shapes):
        flat = made.layout.pack(made._first)
        before = AdapterLayout(made.shapes[:number], made.spec.rank).size if number else 0
        flat[before + 3] = np.nan
        with pytest.raises(
            WireError, match=rf"client 1, layer {shape.name}: expected finite values, got nan"
        ):
            made.add_reply(reply(made, flat=flat), 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=residual",),
        ("strategy.server_optimizer=fedadam",),
        ("method.sharing=alternating",),
    ],
)
def test_a_checkpoint_brings_everything_back(
    overrides: tuple[str, ...], micro: Fixture, play: Fixture
) -> None:
    trained, fresh = (
        play(micro(*overrides)).strategy,
        play(micro(*overrides, "num_rounds=1")).strategy,
    )
    saved = trained.checkpoint(3)
    assert saved.server_round == 3
    fresh.restore(saved)
    again = fresh.checkpoint(3)
    assert set(again.arrays) == set(saved.arrays)
    assert ("optimizer/server_round" in saved.arrays) == (
        "fedadam" in overrides[0] or "sharing" in overrides[0]
    )
    for name, values in saved.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values)
        assert again.arrays[name].dtype == values.dtype
    assert again.state == saved.state


def test_a_checkpoint_of_another_rank_is_refused(micro: Fixture, play: Fixture) -> None:
    four, two = (play(micro(f"method.rank={rank}", "num_rounds=1")).strategy for rank in (4, 2))
    with pytest.raises(
        ShapeError,
        match=rf"expected an adapter of {two.layout.size} values, got {four.layout.size}",
    ):
        two.restore(four.checkpoint(1))


def test_the_record_of_arrays_is_the_model(micro: Fixture, play: Fixture) -> None:
    made = play(micro("strategy=residual", "num_rounds=1")).strategy
    arrays = made.arrays()
    np.testing.assert_array_equal(arrays["adapter"].numpy(), made.layout.pack(made.model.factors))
    flat, ranks = records.pack_delta(made.model.delta)
    np.testing.assert_array_equal(arrays["delta"].numpy(), flat)
    unpacked = records.unpack_delta(arrays["delta"].numpy(), ranks, made.shapes)
    for layer, update in made.model.delta.items():
        np.testing.assert_array_equal(dense(unpacked[layer]), dense(update))
