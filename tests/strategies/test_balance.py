from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.settings.federation import FairnessConfig
from strategies.balance import Balance, objective_of
from strategies.exchange import ClientReply


def config(name: Any, **changes: Any) -> FairnessConfig:
    own = {"bound": 0.5} if name == "bounded_loss" else {}
    return FairnessConfig(name=name, groups="data", **(own | changes))


def reply(client: int, **groups: tuple[float, int, int]) -> ClientReply:
    sums = {n: {"loss_sum": v[0], "correct": v[1], "total": v[2]} for n, v in groups.items()}
    return ClientReply(client, {"groups": sums}, {})


def play_round(balance: Balance, server_round: int, *replies: ClientReply) -> list[dict[str, Any]]:
    balance.begin()
    for one in replies:
        balance.add(one.partition_id, balance.checked(one))
    return balance.finish(server_round)


def test_without_an_objective_nothing_is_asked_sent_or_kept() -> None:
    balance = Balance(config("none"))
    assert balance.instruction() == {}
    assert play_round(balance, 1, ClientReply(0, {}, {})) == []
    assert balance.state() == {"multipliers": {}, "counts": {}}


def test_the_first_round_asks_for_sums_and_weighs_nothing() -> None:
    for fairness in (config("group_dro"), FairnessConfig(name="q_ffl")):
        balance = Balance(fairness)
        balance.begin()
        assert balance.instruction() == {"group-weights": {}}


def test_a_bounded_loss_by_hand() -> None:
    balance = Balance(config("bounded_loss", step_size=2.0))
    lines = play_round(balance, 1, reply(0, a=(3.0, 1, 3), b=(0.4, 2, 2)), reply(1, b=(0.4, 2, 2)))
    # a: mean loss 1.0, over the bound by 0.5; b: mean loss 0.2, under it
    found = {line["group"]: line for line in lines}
    assert found["a"]["multiplier"] == pytest.approx(1.0)
    assert found["b"]["multiplier"] == 0.0
    assert found["a"]["slack"] == pytest.approx(-0.5)
    assert found["b"]["loss"] == pytest.approx(0.2)
    assert found["b"]["total"] == 4
    balance.begin()
    weights = balance.instruction()["group-weights"]
    # (1 + lambda_g N / n_g) / (1 + sum of lambdas), N = 7
    assert weights == pytest.approx({"a": (1 + 7 / 3) / 2, "b": 1 / 2})
    assert 3 * weights["a"] + 4 * weights["b"] == pytest.approx(7), "the mean row weighs 1"


def test_counts_are_of_all_clients_that_have_ever_answered() -> None:
    balance = Balance(config("group_dro"))
    play_round(balance, 1, reply(0, a=(1.0, 0, 5)))
    play_round(balance, 2, reply(1, a=(1.0, 0, 2), b=(1.0, 0, 3)))
    assert balance.counts == {"a": 7, "b": 3}
    play_round(balance, 3, reply(0, a=(1.0, 0, 4)))
    assert balance.counts == {"a": 6, "b": 3}


def test_a_state_goes_on_where_it_was() -> None:
    one = Balance(config("agnostic"))
    play_round(one, 1, reply(0, a=(5.0, 0, 5), b=(1.0, 3, 3)))
    two = Balance(config("agnostic"))
    two.restore(one.state())
    one.begin()
    two.begin()
    assert two.instruction() == one.instruction()
    later = reply(1, a=(2.0, 0, 5), b=(3.0, 3, 3))
    assert play_round(two, 2, later) == play_round(one, 2, later)


@pytest.mark.parametrize(
    ("info", "match"),
    [
        ({}, "client 3: expected sums by group, got None"),
        ({"groups": {}}, "client 3: expected sums by group, got {}"),
        ({"groups": {"a": 5}}, "client 3, group a: expected sums, got 5"),
        ({"groups": {"a": {"loss_sum": 1.0, "correct": 1}}}, "client 3, group a: total: expected a whole number"),
        ({"groups": {"a": {"loss_sum": float("nan"), "correct": 1, "total": 2}}}, "loss_sum: expected a finite number"),
        ({"groups": {"a": {"loss_sum": 1.0, "correct": 3, "total": 2}}}, "expected 0 <= correct <= total"),
    ],
)  # fmt: skip
def test_sums_that_are_none_are_refused(info: dict[str, Any], match: str) -> None:
    with pytest.raises(WireError, match=match):
        Balance(config("group_dro")).checked(ClientReply(3, info, {}))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fairness\.step_size: expected > 0"):
        objective_of(config("group_dro", step_size=0.0))
    with pytest.raises(ConfigError, match=r"fairness\.bound"):
        FairnessConfig(name="bounded_loss", groups="data")
    with pytest.raises(ConfigError, match=r"fairness\.groups=none"):
        FairnessConfig(name="group_dro")


def test_a_retry_of_a_round_has_the_rounds_own_weights() -> None:
    balance = Balance(config("group_dro"))
    play_round(balance, 1, reply(0, a=(5.0, 0, 5), b=(1.0, 3, 3)))
    balance.begin()
    before = balance.instruction()
    late = reply(1, a=(9.0, 0, 3))
    balance.add(1, balance.checked(late))
    assert balance.instruction() == before


def test_a_client_counts_by_the_mean_weight_of_its_rows() -> None:
    balance = Balance(config("agnostic", step_size=10.0))
    balance.begin()
    first = reply(0, a=(5.0, 0, 5), b=(0.0, 5, 5))
    assert balance.factor(balance.checked(first)) == 1.0, "no weights yet"
    play_round(balance, 1, first)
    balance.begin()
    assert balance.instruction()["group-weights"] == pytest.approx({"a": 2.0, "b": 0.0})
    mixed = balance.checked(reply(1, a=(1.0, 0, 1), b=(1.0, 0, 3)))
    assert balance.factor(mixed) == pytest.approx(0.5)
    assert 0 < balance.factor(balance.checked(reply(2, b=(1.0, 0, 3)))) < 1e-6
