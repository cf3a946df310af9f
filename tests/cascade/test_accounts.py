from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.cascade import (
    TOKENS,
    Price,
    TierLoad,
    break_even_deferral,
    expected_cost,
    latency_percentiles,
    parse_prices,
    side_by_side,
    total_cost,
)
from fedllm_flwr.errors import ConfigError

LARGE = TierLoad(1.0)
shares = st.floats(0, 1)
loads = st.builds(TierLoad, st.floats(0, 5), st.integers(1, 9), shares)


@pytest.mark.parametrize(
    ("first", "deferred", "saving"),
    [
        (TierLoad(1 / 8, 5), 0.05, 1.48), (TierLoad(1 / 8, 5), 0.2, 1.21), (TierLoad(1 / 8, 5), 0.4, 0.98),
        (TierLoad(1 / 70, 5), 0.05, 8.24), (TierLoad(1 / 70, 5), 0.2, 3.68), (TierLoad(1 / 70, 5), 0.4, 2.12),
        (TierLoad(1 / 8, 3), 0.2, 1.74),
        (TierLoad(1 / 8, 5, 0.0), 0.05, 5.71), (TierLoad(1 / 8, 5, 0.0), 0.2, 3.08),
        (TierLoad(1 / 8, 5, 0.0), 0.4, 1.90),
    ],
)  # fmt: skip
def test_savings_over_always_the_large_model(
    first: TierLoad, deferred: float, saving: float
) -> None:
    """Prices by parameters, billions: k of 1 before one of 8 or 70."""
    assert round(1 / expected_cost([first, LARGE], [deferred]), 2) == saving
    assert expected_cost([first, LARGE], [break_even_deferral(first)]) == pytest.approx(1)


def test_three_tiers_halve_the_cost() -> None:
    chain = [TierLoad(1 / 70, 5), TierLoad(8 / 70, 5), LARGE]
    assert expected_cost(chain, [0.4, 0.5]) == pytest.approx(0.5)


def test_sending_text_to_the_cloud_falls_by_the_deferral_rate() -> None:
    """Calls that cost nothing before: the factor is 1 / p, 14 at 7 %."""
    assert 1 / expected_cost([TierLoad(0.0), LARGE], [0.07]) == pytest.approx(14.3, abs=0.1)


@given(st.lists(loads, min_size=1, max_size=4), st.data())
def test_a_cascade_is_never_cheaper_than_its_first_tier(
    tiers: list[TierLoad], data: st.DataObject
) -> None:
    deferral = [data.draw(shares) for _ in tiers[1:]]
    found = expected_cost(tiers, deferral)
    assert found >= tiers[0].cost
    everything = expected_cost(tiers, [1.0] * len(deferral))
    assert (
        found
        <= everything * (1 + 1e-12)
        == pytest.approx(sum(tier.cost for tier in tiers) * (1 + 1e-12))
    )


@given(st.floats(0, 5), st.integers(1, 9), shares)
def test_side_by_side_lies_between_the_mean_and_the_sum(
    cost: float, members: int, parallelism: float
) -> None:
    total = Fraction(cost) * members
    found = side_by_side(total, members, parallelism)
    assert cost * (1 - 1e-9) <= found <= float(total) * (1 + 1e-9)
    assert side_by_side(total, members, 1) == pytest.approx(float(total))
    assert side_by_side(total, members, 0) == pytest.approx(cost)
    assert found == pytest.approx(TierLoad(cost, members, parallelism).cost)


def test_costs_are_exact() -> None:
    prices = parse_prices("small:0.1/0.2,large:0.9/0.9", ["small", "large"])
    found = total_cost({"small": (3, 3), "large": (0, 10**9)}, prices)
    assert found == {"small": Fraction(9, 10), "large": Fraction(9 * 10**8)}
    assert 0.1 * 3 + 0.2 * 3 != 0.9, "which floats would miss"
    with pytest.raises(ConfigError, match="expected one for tier 'huge', got none"):
        total_cost({"huge": (1, 1)}, prices)


def test_prices_as_they_are_typed() -> None:
    assert parse_prices("", ["a", "b"]) == {"a": TOKENS, "b": TOKENS}
    found = parse_prices(" b:1/2e-1 , org/a:1:.5/0 ", ["org/a:1", "b"])
    assert list(found) == ["org/a:1", "b"]
    assert found["b"] == Price(Fraction(1), Fraction(1, 5))
    assert found["org/a:1"] == Price(Fraction(1, 2), Fraction(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1", "expected tier:input/output, such as small:0.1/0.1, got 'a:1'"),
        ("a:1/2/3,b:1/1", "got 'a:1/2/3'"),
        ("a:-1/2,b:1/1", "got 'a:-1/2'"),
        ("a:x/2,b:1/1", "got 'a:x/2'"),
        ("a:nan/2,b:1/1", "got 'a:nan/2'"),
        ("a:1/1,", "got ''"),
        ("a:1/1,c:1/1", "expected each of the tiers a, b once, got 'c'"),
        ("a:1/1,a:1/1", "expected each of the tiers a, b once, got 'a' again"),
        ("a:1/1", "expected each of the tiers a, b once, got none for 'b'"),
    ],
)
def test_prices_that_cannot_be_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_prices(text, ["a", "b"])
    assert message in str(caught.value)


def test_percentiles_show_the_tail_that_the_median_hides() -> None:
    """95 of 100 queries stay at 50 ms, 5 are deferred: p50 is local, p99 is not."""
    seconds = np.array([0.05] * 95 + [0.45] * 5)
    found = latency_percentiles(seconds)
    assert found[50] == 0.05
    assert 0.05 < found[95] < 0.45
    assert found[99] == pytest.approx(0.45)
    with pytest.raises(ConfigError, match="at least one query"):
        latency_percentiles(np.zeros(0))


def test_figures_out_of_range_are_refused() -> None:
    for figures in ((-1.0, 1, 1.0), (1.0, 0, 1.0), (1.0, 1, 1.1), (1.0, 1, -0.1)):
        with pytest.raises(ConfigError, match="tier: expected relative_cost >= 0"):
            TierLoad(*figures)
    with pytest.raises(
        ConfigError, match="deferral share for every tier but the last, got 0 for 2"
    ):
        expected_cost([LARGE, LARGE], [])
    with pytest.raises(ConfigError, match=r"shares in \[0, 1\], got 1.5"):
        expected_cost([LARGE, LARGE], [1.5])
    with pytest.raises(ConfigError, match=r"parallelism: expected in \[0, 1\], got 2"):
        side_by_side(Fraction(1), 1, 2)
    with pytest.raises(ConfigError, match=r"input and output >= 0, got -1.0 and 0.0"):
        Price(Fraction(-1), Fraction(0))
