import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.fairness import AccuracyGap, BoundedLoss, GroupSums


def test_a_row_weighs_by_its_groups_penalty():
    weights = BoundedLoss().row_weights({"a": 0.0, "b": 3.0}, {"a": 30, "b": 10})
    assert weights == pytest.approx({"a": 1 / 4, "b": (1 + 3 * 4) / 4})
    assert BoundedLoss().row_weights({}, {"a": 30, "b": 10}) == {"a": 1.0, "b": 1.0}


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 50), st.floats(0, 4)), min_size=1))
def test_the_weighted_loss_is_the_lagrangian_over_one_plus_all_penalties(groups):
    names = [f"g{i}" for i in range(len(groups))]
    penalties = {name: group[0] for name, group in zip(names, groups, strict=True)}
    sums = {name: GroupSums(n * r, 0, n) for name, (_, n, r) in zip(names, groups, strict=True)}
    total = sum(value.total for value in sums.values())
    weights = BoundedLoss().row_weights(penalties, {name: sums[name].total for name in names})
    found = sum(weights[name] * sums[name].loss_sum for name in names) / total
    mean = sum(value.loss_sum for value in sums.values()) / total
    lagrangian = mean + sum(penalties[name] * sums[name].mean_loss for name in names)
    assert found == pytest.approx(lagrangian / (1 + sum(penalties.values())), abs=1e-9)


def test_projected_ascent_by_hand():
    objective = BoundedLoss(step=0.5, bound=1.0, budget=2.0)
    sums = {"a": GroupSums(4.0, 0, 8), "b": GroupSums(24.0, 0, 8)}  # r = 0.5 and 3
    assert objective.slack(sums) == {"a": 0.5, "b": -2.0}
    assert objective.update({"a": 0.1, "b": 0.2}, sums) == pytest.approx({"a": 0.0, "b": 1.2})
    assert objective.update({"a": 1.0, "b": 1.5}, sums) == pytest.approx({"a": 0.125, "b": 1.875})


def test_an_absent_group_keeps_its_penalty_and_its_part_of_the_budget():
    objective = BoundedLoss(step=1.0, bound=1.0, budget=2.0)
    found = objective.update({"a": 1.5, "b": 0.0}, {"b": GroupSums(24.0, 0, 8), "a": GroupSums()})
    assert found == pytest.approx({"a": 1.5, "b": 0.5})


@pytest.mark.parametrize("bound", [0.3, 0.36, 0.5])
def test_the_penalty_is_the_kkt_multiplier(two_points, bound):
    """r_b = (1 - w)² = ζ gives w = 1 - √ζ; stationarity ¾·w = (¼ + λ)(1 - w) gives λ."""
    objective = BoundedLoss(step=1.0, bound=bound, budget=50.0)
    state, w = two_points.ascend(objective, 3000)
    wanted = 1 - math.sqrt(bound)
    assert w[0] == pytest.approx(wanted, abs=1e-6)
    assert state["b"] == pytest.approx(0.75 * wanted / (1 - wanted) - 0.25, rel=1e-4)
    assert state["a"] == 0


def test_a_constraint_that_holds_anyway_costs_nothing(two_points):
    state, w = two_points.ascend(
        BoundedLoss(bound=0.6), 50
    )  # at w = 1/4 the losses are 1/16 and 9/16
    assert state == {"a": 0.0, "b": 0.0}
    assert w[0] == pytest.approx(0.25)


def test_out_of_reach_the_penalties_end_on_the_budget(two_points):
    state, w = two_points.ascend(BoundedLoss(step=1.0, bound=0.01, budget=20.0), 500)
    assert sum(state.values()) == pytest.approx(20)
    assert w[0] == pytest.approx(0.5, abs=0.02)  # nothing is better for the worse group


def fairlearn_saddle(problem, bound, budget):
    """The mean penalties, the mixture's group losses and its mean loss of exponentiated gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its dependencies
        from fairlearn import reductions

        mitigator = reductions.ExponentiatedGradient(
            LinearRegression(fit_intercept=False),
            reductions.BoundedGroupLoss(reductions.SquareLoss(-10, 10), upper_bound=bound),
            eps=1 / budget,
            nu=1e-6,
            max_iter=150,
        )
        mitigator.fit(problem.features, problem.targets, sensitive_features=problem.groups)
    shares = mitigator.weights_
    losses = dict.fromkeys(problem.counts, 0.0)
    for index, share in shares.items():
        w = mitigator.predictors_[index].coef_
        for group, sums in problem.sums(w).items():
            losses[group] += share * sums.mean_loss
    return mitigator.lambda_vecs_LP_.iloc[:, -1].to_dict(), losses


@pytest.mark.parametrize("bound", [0.3, 0.4])
def test_penalties_and_losses_agree_with_fairlearn(two_slopes, bound):
    objective = BoundedLoss(step=1.0, bound=bound, budget=10.0)
    state, w = two_slopes.ascend(objective, 3000)
    penalties, losses = fairlearn_saddle(two_slopes, bound, 10.0)
    ours = {group: sums.mean_loss for group, sums in two_slopes.sums(w).items()}
    assert ours == pytest.approx(losses, abs=2e-3)
    assert state == pytest.approx(penalties, abs=0.03)
    assert state["b"] > 0.1
    plain = two_slopes.sums(two_slopes.fit(dict.fromkeys(state, 1.0)))
    assert plain["b"].mean_loss > bound >= ours["b"] - 1e-4


def test_the_gap_is_measured_on_errors_from_the_best_group():
    objective = AccuracyGap(step=1.0, gap=0.1, least_rows=10)
    sums = {"a": GroupSums(0.0, 18, 20), "b": GroupSums(0.0, 12, 20), "c": GroupSums(9.0, 17, 20)}
    assert objective.slack(sums) == pytest.approx({"a": 0.1, "b": -0.2, "c": 0.05})
    assert objective.update({"a": 0.5}, sums) == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.0})


def test_a_tiny_group_neither_moves_nor_sets_the_lowest_error():
    objective = AccuracyGap(step=1.0, gap=0.1, least_rows=10)
    sums = {"a": GroupSums(0.0, 16, 20), "b": GroupSums(0.0, 15, 20), "lucky": GroupSums(0.0, 9, 9)}
    assert objective.slack(sums) == pytest.approx({"a": 0.1, "b": 0.05})
    assert objective.update({"lucky": 0.3}, sums) == {"a": 0.0, "b": 0.0, "lucky": 0.3}


def logistic(problem, weights):
    """The w of the least weighted logistic loss, by gradient descent."""
    row_weights = sum(weights[group] * rows for group, rows in problem.members.items())
    margins = problem.targets[:, None] * problem.features
    w = np.zeros(problem.features.shape[1])
    for _ in range(300):
        w += (row_weights[:, None] * margins / (1 + np.exp(margins @ w))[:, None]).mean(axis=0)
    return w


def logistic_sums(problem, w):
    margins = problem.targets * (problem.features @ w)
    losses = np.logaddexp(0, -margins)
    return {
        group: GroupSums(float(losses[rows].sum()), int((margins[rows] > 0).sum()), int(rows.sum()))
        for group, rows in problem.members.items()
    }


def test_the_gap_closes_by_raising_the_group_that_is_behind(two_halves):
    objective = AccuracyGap(step=1.0, gap=0.05, budget=5.0)
    state = objective.start(two_halves.counts)
    plain = logistic_sums(two_halves, logistic(two_halves, dict.fromkeys(state, 1.0)))
    for _ in range(60):
        weights = objective.row_weights(state, two_halves.counts)
        sums = logistic_sums(two_halves, logistic(two_halves, weights))
        state = objective.update(state, sums)
    assert plain["a"].accuracy - plain["b"].accuracy > 0.1
    assert min(objective.slack(sums).values()) >= -1e-9
    assert sums["b"].accuracy > plain["b"].accuracy + 0.02
    assert weights["b"] > weights["a"] >= 1 / (1 + objective.budget)  # nothing is rewarded


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundedLoss(step=0), r"^BoundedLoss\.step: expected > 0, got 0"),
        (lambda: AccuracyGap(budget=-1.0), r"^AccuracyGap\.budget: expected > 0, got -1"),
        (lambda: BoundedLoss(bound=math.inf), r"^bounded_loss\.bound: expected > 0, got inf"),
        (lambda: AccuracyGap(gap=1.0), r"^accuracy_gap\.gap: expected in \[0, 1\), got 1"),
        (lambda: AccuracyGap(least_rows=0), r"^accuracy_gap\.least_rows: expected >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
