import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedllm_flwr.cascade import (
    ALWAYS_DEFER,
    Histogram,
    clopper_pearson_upper,
    histogram,
    levels_of,
    solve,
)
from fedllm_flwr.errors import ConfigError, ShapeError

EDGES = levels_of(4)


@pytest.mark.parametrize(("errors", "trials"), [(0, 30), (3, 50), (49, 50)])
def test_at_the_bound_so_few_errors_would_be_a_surprise(errors: int, trials: int) -> None:
    bound = clopper_pearson_upper(errors, trials, 0.95)
    assert binom.cdf(errors, trials, bound) == pytest.approx(0.05)


def test_bounds_at_the_ends() -> None:
    assert clopper_pearson_upper(0, 59, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert clopper_pearson_upper(5, 5, 0.95) == 1
    assert clopper_pearson_upper(0, 0, 0.95) == 1
    for errors, trials, confidence in ((2, 1, 0.9), (-1, 1, 0.9), (0, 1, 1.0), (0, 1, 0.0)):
        with pytest.raises(ConfigError, match="expected 0 <= errors <= trials and confidence in"):
            clopper_pearson_upper(errors, trials, confidence)


def test_bins_hold_their_own_level_and_what_lies_above() -> None:
    found = histogram(
        np.array([0.0, 0.25, 0.5, 0.6, 1.0, 1.0]), np.array([1, 0, 1, 1, 1, 0], bool), EDGES
    )
    assert found.total.tolist() == [1, 1, 2, 0, 2]
    assert found.correct.tolist() == [1, 0, 2, 0, 1]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40),
    st.integers(1, 5),
)
def test_clients_histograms_add_up_to_the_pooled_one(
    answers: list[tuple[int, bool]], clients: int
) -> None:
    levels = np.array([count / 4 for count, _ in answers])
    correct = np.array([right for _, right in answers])
    parts = [
        histogram(levels[place::clients], correct[place::clients], EDGES)
        for place in range(clients)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    pooled = histogram(levels, correct, EDGES)
    assert total.total.tolist() == pooled.total.tolist()
    assert total.correct.tolist() == pooled.correct.tolist()
    assert int(total.total.sum()) == len(answers)


def counts(correct: list[int], total: list[int]) -> Histogram:
    return Histogram(EDGES, np.array(correct), np.array(total))


def test_a_threshold_by_hand() -> None:
    # From 1.0: 0 of 100 wrong; from 0.75: 4 of 200; from 0.5: 44 of 300.
    found = solve(counts([0, 0, 60, 96, 100], [0, 0, 100, 100, 100]), risk=0.05)
    assert (found.theta, found.accepted, found.errors, found.total) == (0.75, 200, 4, 300)
    assert found.bound == clopper_pearson_upper(4, 200, 0.95) < 0.05
    assert clopper_pearson_upper(44, 300, 0.95) > 0.05


def test_the_first_failure_ends_the_search_though_a_later_one_would_pass() -> None:
    # From 1.0: 10 of 100 wrong, from 0.75: 10 of 1100.
    found = solve(counts([0, 0, 0, 1000, 90], [0, 0, 0, 1000, 100]), risk=0.05)
    assert found.theta == ALWAYS_DEFER
    assert math.isnan(found.bound)
    assert (found.accepted, found.errors, found.total) == (0, 0, 1100)


def test_bins_that_are_too_small_to_pass_are_passed_over() -> None:
    found = solve(counts([0, 0, 0, 200, 3], [0, 0, 0, 200, 3]), risk=0.05)
    assert found.theta == 0.75, "and no further down, where nothing was seen"


@pytest.mark.parametrize("total", [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 58]])
def test_without_enough_answers_everything_is_deferred(total: list[int]) -> None:
    assert solve(counts(total, total), risk=0.05).theta == ALWAYS_DEFER
    assert solve(counts(total, total), risk=0.05, among="all").theta == ALWAYS_DEFER


def test_among_all_queries_the_risk_is_smaller() -> None:
    # From 0.75 20 of 200 accepted are wrong (10 %), but only 20 of 1000 queries (2 %).
    table = counts([400, 0, 0, 80, 100], [800, 0, 0, 100, 100])
    assert solve(table, risk=0.05).theta == 1.0
    found = solve(table, risk=0.05, among="all")
    assert (found.theta, found.errors, found.total) == (0.75, 20, 1000)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 10)), min_size=5, max_size=5))
@settings(deadline=None)
def test_less_risk_among_all_queries_never_accepts_more(bins: list[tuple[int, int]]) -> None:
    table = counts([right for right, _ in bins], [right + wrong for right, wrong in bins])
    thetas = [solve(table, risk, among="all").theta for risk in (0.01, 0.05, 0.2, 0.5)]
    assert thetas == sorted(thetas, reverse=True)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 10)), min_size=5, max_size=5))
@settings(deadline=None)
def test_the_result_meets_the_bound_on_its_own_counts(bins: list[tuple[int, int]]) -> None:
    table = counts([right for right, _ in bins], [right + wrong for right, wrong in bins])
    found = solve(table, risk=0.2)
    if found.theta == ALWAYS_DEFER:
        assert found.accepted == 0
        return
    kept = [bins[place] for place, edge in enumerate(EDGES) if edge >= found.theta]
    assert found.accepted == sum(right + wrong for right, wrong in kept)
    assert found.errors == sum(wrong for _, wrong in kept)
    assert found.bound == clopper_pearson_upper(found.errors, found.accepted, 0.95) <= 0.2


@pytest.mark.parametrize("among", ["accepted", "all"])
@pytest.mark.parametrize("errors", [[0.9, 0.6, 0.4, 0.2, 0.101], [0.5, 0.3, 0.11, 0.1, 0.02]])
def test_the_stated_risk_is_exceeded_no_more_often_than_stated(
    among: str, errors: list[float]
) -> None:
    """Calibrated 600 times on 150 queries; the true risk of the result is known."""
    rng = np.random.default_rng(5)
    shares, error, risk = np.array([0.1, 0.15, 0.2, 0.25, 0.3]), np.array(errors), 0.1
    wrong = np.cumsum((shares * error)[::-1])[::-1]
    true_risk = wrong / np.cumsum(shares[::-1])[::-1] if among == "accepted" else wrong
    exceeded = accepted = 0
    for _ in range(600):
        total = rng.multinomial(150, shares)
        table = Histogram(EDGES, total - rng.binomial(total, error), total)
        found = solve(table, risk, confidence=0.9, among=among)
        if found.theta != ALWAYS_DEFER:
            accepted += 1
            exceeded += true_risk[EDGES.index(found.theta)] > risk
    assert exceeded / 600 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 600)
    assert accepted > 0, "something is accepted at all"


def test_what_is_no_histogram_is_refused() -> None:
    ones = np.ones(5, int)
    with pytest.raises(ShapeError, match="ascending finite edges"):
        Histogram((0.0, 0.0), np.ones(2, int), np.ones(2, int))
    with pytest.raises(ShapeError, match="ascending finite edges"):
        Histogram((), np.ones(0, int), np.ones(0, int))
    with pytest.raises(ShapeError, match="expected correct as 5 integers, got float64"):
        Histogram(EDGES, ones * 0.5, ones)
    with pytest.raises(ShapeError, match="expected total as 5 integers"):
        Histogram(EDGES, ones, ones[:2])
    with pytest.raises(ShapeError, match="0 <= correct <= total"):
        Histogram(EDGES, ones + 1, ones)
    with pytest.raises(ShapeError, match="expected edges"):
        counts([1] * 5, [1] * 5) + Histogram((0.0,), ones[:1], ones[:1])
    with pytest.raises(ShapeError, match=r"levels >= 0\.5, got 0\.1"):
        histogram(np.array([0.1]), np.array([True]), (0.5, 0.7))
    with pytest.raises(ShapeError, match="of one length"):
        histogram(np.array([0.1]), np.array([True, False]), EDGES)
    with pytest.raises(ConfigError, match="risk and confidence in"):
        solve(counts([1] * 5, [1] * 5), risk=0.0)
