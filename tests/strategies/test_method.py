from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.training.settings import scheduled_rate
from strategies import STRATEGIES, Hosting, build_strategy
from strategies.baselines import Recorder
from strategies.exchange import ClientReply
from strategies.method import FederatedMethod

Fixture = Callable[..., Any]


@pytest.fixture
def build(micro: Fixture) -> Fixture:
    """A strategy of the given overrides, without nodes."""

    def made(*overrides: str, partition_ids: list[int] | None = None) -> Any:
        grid = LoopbackGrid(lambda message, context: message, num_nodes=0)
        hosting = Hosting(grid, 1.0, print, lambda *_: None)
        config = micro(*overrides)
        return build_strategy(
            config,
            hosting,
            Recorder(print),
            task_kind="classification",
            partition_ids=partition_ids,
        )

    return made


def test_every_strategy_is_such_a_method() -> None:
    assert all(issubclass(strategy, FederatedMethod) for strategy in STRATEGIES.values())


@pytest.mark.parametrize(
    ("name", "rule"), [("fedresprompt", "controller_mean"), ("fedgrass", "row_mean")]
)
def test_a_method_without_such_values_says_so(name: str, rule: str, build: Fixture) -> None:
    strategy = build(f"method={name}", f"strategy={rule}")
    with pytest.raises(ConfigError, match=f"method={name}: its replies are not one set of values"):
        strategy.start_values(1)
    with pytest.raises(ConfigError, match=f"method={name}"):
        strategy.reply_values(ClientReply(0, {}, {}), 1)


def test_the_clients_are_the_configurations_or_those_that_are_named(build: Fixture) -> None:
    assert build().partition_ids == [0, 1, 2, 3]
    assert build(partition_ids=[2]).partition_ids == [2]


def test_a_client_weighs_its_examples_or_one(build: Fixture) -> None:
    reply = ClientReply(1, {}, {})
    assert build().weight_of(reply, 7) == 7.0
    assert build("strategy.weighting=uniform").weight_of(reply, 7) == 1.0
    with pytest.raises(WireError, match="1"):
        build().weight_of(reply, 0)


def test_the_learning_rate_follows_warm_up_and_schedule(build: Fixture) -> None:
    overrides = ("num_rounds=5", "client.schedule=linear", "client.warmup_rounds=2")
    strategy = build(*overrides, "optimizer.learning_rate=0.5", "client.minimum_fraction=0.1")
    rates = [strategy.learning_rate(server_round) for server_round in range(1, 6)]
    assert rates[:2] == pytest.approx([0.5 / 3, 1.0 / 3]), "warm-up"
    for server_round, rate in enumerate(rates, 1):
        expected = scheduled_rate(
            0.5, "linear", server_round=server_round, num_rounds=5, warmup_rounds=2, minimum_fraction=0.1
        )  # fmt: skip
        assert rate == expected
    assert rates[2] > rates[3] > rates[4] > 0


def test_by_default_replies_pass_and_all_parts_are_needed(build: Fixture) -> None:
    strategy = build()
    parts = {"adapter": np.zeros(3, np.float32)}
    assert strategy.parts_for([0], parts) is parts
    replies = [ClientReply(0, {}, {}), ClientReply(1, {}, {})]
    assert list(strategy.trained(1, iter(replies))) == replies
    assert list(strategy.measured(1, iter(replies))) == replies


def test_arrays_are_encoded_once_unless_a_client_is_served_its_own(build: Fixture) -> None:
    strategy = build()
    parts = {"adapter": np.zeros(3, np.float32)}
    content = strategy.contents(parts)
    assert content([0, 1]) is content([2])
    own = {"served/2": np.ones(3, np.float32)}
    mixed = strategy.contents(parts, lambda clients: own if 2 in clients else {})
    assert mixed([0, 1]) is mixed([1])
    assert mixed([2])["arrays"]["flat"].numpy().tolist() == [0, 0, 0, 1, 1, 1]
