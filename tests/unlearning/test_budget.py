import math

import numpy as np
import pytest
from scipy.stats import norm

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import auc
from fedllm_flwr.unlearning.budget import (
    ALPHA,
    ATTACKABLE,
    DEFAULT_BUDGET,
    MARGIN,
    POWER,
    QueryBudget,
    auc_standard_error,
    least_queries,
)


@pytest.mark.parametrize("area", [0.5, 0.7, 0.9])
def test_the_standard_error_is_that_of_simulated_areas(area):
    """Of normal scores, for which the formula is near; 2000 areas know their deviation to 1.6 %."""
    rng = np.random.default_rng(0)
    gap = math.sqrt(2) * norm.ppf(area)
    found = auc(rng.standard_normal((2000, 60)) + gap, rng.standard_normal((2000, 40))).std()
    assert auc_standard_error(area, 60, 40) == pytest.approx(found, rel=0.12)


def test_the_standard_error_by_hand():
    """At 0.5, Q1 = Q2 = 1/3: the variance is (m + o + 1) / (12 m o), as of Wilcoxon's statistic."""
    assert auc_standard_error(0.5, 7, 11) == pytest.approx(math.sqrt(19 / (12 * 77)))
    assert auc_standard_error(1.0, 7, 11) == 0


def test_the_least_queries_are_the_least():
    needed = least_queries()
    z = norm.ppf(1 - ALPHA), norm.ppf(POWER)
    for n, enough in ((needed // 2, True), (needed // 2 - 1, False)):
        errors = auc_standard_error(0.5, n, n), auc_standard_error(ATTACKABLE, n, n)
        told_apart = z[0] * errors[0] + z[1] * errors[1] <= ATTACKABLE - 0.5 - MARGIN
        assert bool(told_apart) is enough
    assert needed == 118
    assert needed < DEFAULT_BUDGET
    assert least_queries(power=0.8) < needed < least_queries(power=0.99)
    assert least_queries(attackable=0.9) < needed < least_queries(attackable=0.6)


def test_the_least_queries_have_the_power_that_they_claim():
    """A model of AUC 0.7 is told from 0.5 beyond the margin, where the null is known, as often as stated."""
    n, rng = least_queries() // 2, np.random.default_rng(1)
    gap = math.sqrt(2) * norm.ppf(ATTACKABLE)
    found = auc(rng.standard_normal((4000, n)) + gap, rng.standard_normal((4000, n)))
    beyond = 0.5 + MARGIN + norm.ppf(1 - ALPHA) * auc_standard_error(0.5, n, n)
    assert (found > beyond).mean() == pytest.approx(POWER, abs=0.03)


def test_queries_are_counted_and_stop_at_the_limit():
    budget = QueryBudget(200)
    budget.spend("lira", 120)
    budget.spend("extraction", 50)
    budget.spend("lira", 10)
    assert budget.spent == {"lira": 130, "extraction": 50}
    with pytest.raises(ConfigError, match="paired: expected 0 to 20 more queries of 200, got 21"):
        budget.spend("paired", 21)
    with pytest.raises(ConfigError, match="got -1"):
        budget.spend("paired", -1)
    assert budget.left == 20
    budget.spent["lira"] = 0
    budget.spend("paired", 20)
    assert budget.left == 0


def test_a_budget_without_power_says_how_many_are_needed():
    with pytest.raises(
        ConfigError, match=r"expected at least 118 queries for a power of 0.9 .* got 117"
    ):
        QueryBudget(117)
    assert QueryBudget(118).left == 118
    assert QueryBudget(10, least=10).left == 10


@pytest.mark.parametrize(
    "wrong", [{"attackable": 0.55}, {"power": 0.3}, {"alpha": 0.0}, {"margin": -0.1}]
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="queries: expected alpha"):
        least_queries(**wrong)


def test_errors_of_no_examples_are_refused():
    with pytest.raises(ConfigError, match=r"got 0.5, 0 and 3"):
        auc_standard_error(0.5, 0, 3)
