import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.fairness import Agnostic, GroupDro, GroupSums
from fedllm_flwr.fairness.mixtures import LEAST_SHARE

both = pytest.mark.parametrize("objective", [GroupDro(step=0.5), Agnostic(step=0.5)], ids=repr)
SUMS = {"a": GroupSums(2.0, 8, 10), "b": GroupSums(20.0, 2, 10)}  # r = 0.2 and 2.0


@both
def test_shares_start_uniform_and_give_the_mean_over_groups(objective):
    state = objective.start(["a", "b"])
    assert state == {"a": 0.5, "b": 0.5}
    assert objective.row_weights(state, {"a": 30, "b": 10}) == pytest.approx({"a": 2 / 3, "b": 2})


@both
def test_shares_of_the_rows_give_the_plain_mean(objective):
    weights = objective.row_weights({"a": 0.75, "b": 0.25}, {"a": 30, "b": 10})
    assert weights == pytest.approx({"a": 1, "b": 1})


@both
@given(q=st.floats(0.01, 0.99), n=st.integers(1, 50), m=st.integers(1, 50))
def test_the_weighted_mean_over_rows_is_the_mixture_of_the_groups_means(objective, q, n, m):
    sums = {"a": GroupSums(0.3 * n, 0, n), "b": GroupSums(1.7 * m, 0, m)}
    weights = objective.row_weights({"a": q, "b": 1 - q}, {"a": n, "b": m})
    weighted = sum(weights[group] * sums[group].loss_sum for group in sums) / (n + m)
    assert weighted == pytest.approx(0.3 * q + 1.7 * (1 - q))


def test_exponentiated_ascent_by_hand():
    found = GroupDro(step=0.5).update({"a": 0.6, "b": 0.4}, SUMS)
    raised = {"a": 0.6 * math.exp(0.1), "b": 0.4 * math.exp(1.0)}
    total = sum(raised.values())
    assert found == pytest.approx({group: value / total for group, value in raised.items()})


def test_projected_ascent_by_hand():
    found = Agnostic(step=0.5).update({"a": 0.7, "b": 0.3}, SUMS)  # (0.8, 1.3) on the simplex
    assert found == pytest.approx({"a": 0.25, "b": 0.75})
    assert Agnostic(step=2.0).update(found, SUMS) == {"a": 0.0, "b": 1.0}


@both
def test_a_new_group_joins_with_the_mean_share(objective):
    found = objective.join({"a": 0.9, "b": 0.1}, ["c", "a"])
    assert found == pytest.approx({"a": 0.6, "b": 0.2 / 3, "c": 1 / 3})
    assert sum(found.values()) == pytest.approx(1)


@both
def test_groups_of_a_round_move_within_the_share_that_they_had(objective):
    state = {"a": 0.3, "b": 0.3, "c": 0.4}
    found = objective.update(state, SUMS | {"c": GroupSums()})
    assert found["c"] == pytest.approx(0.4)
    assert found["b"] > 0.3 > found["a"]
    assert sum(found.values()) == pytest.approx(1)
    weights = objective.row_weights(state, {"a": 10, "b": 10})
    assert weights == pytest.approx({"a": 1, "b": 1})


def test_rows_whose_groups_have_no_share_weigh_one():
    assert Agnostic().row_weights({"a": 0.0, "b": 1.0}, {"a": 5}) == {"a": 1.0}


def test_a_share_never_underflows_and_comes_back():
    objective = GroupDro(step=50.0)
    state = objective.start(SUMS)
    for _ in range(40):
        state = objective.update(state, SUMS)
    assert state["a"] == pytest.approx(LEAST_SHARE)
    turned = {"a": GroupSums(20.0, 0, 10), "b": GroupSums(0.0, 10, 10)}
    assert objective.update(state, turned)["a"] > 0.99


def quadratics(w, shift):
    """r_a = w² and r_b = (w - 1)² + shift, ten rows each."""
    return {"a": GroupSums(10 * w**2, 0, 10), "b": GroupSums(10 * ((w - 1) ** 2 + shift), 0, 10)}


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("objective", [Agnostic(step=0.05), GroupDro(step=0.1)], ids=repr)
def test_two_quadratics_reach_the_minimax_point(objective, shift):
    """r_a = r_b at w = (1 + shift) / 2; there q_a w = q_b (1 - w), so q_b = w."""
    state, w = objective.start(["a", "b"]), 0.0
    for _ in range(2000):
        weights = objective.row_weights(state, {"a": 10, "b": 10})
        w -= 0.1 * (weights["a"] * 2 * w + weights["b"] * 2 * (w - 1)) / 2
        state = objective.update(state, quadratics(w, shift))
    assert w == pytest.approx((1 + shift) / 2, abs=1e-4)
    assert state["b"] == pytest.approx((1 + shift) / 2, abs=1e-3)


def test_a_group_that_is_worse_everywhere_gets_all_the_weight():
    """With shift 3 the second loss is above the first for every w in [0, 1]: the minimax point is its minimum."""
    state, w = Agnostic(step=0.05).start(["a", "b"]), 0.0
    for _ in range(500):
        weights = Agnostic().row_weights(state, {"a": 10, "b": 10})
        w -= 0.1 * (weights["a"] * 2 * w + weights["b"] * 2 * (w - 1)) / 2
        state = Agnostic(step=0.05).update(state, quadratics(w, 3.0))
    assert state == {"a": 0.0, "b": 1.0}
    assert w == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "step"), [(Agnostic, 0.02), (GroupDro, 0.05)], ids=["agnostic", "group_dro"]
)
def test_the_largest_loss_is_least_over_a_grid(two_slopes, objective, step):
    _, w = two_slopes.ascend(objective(step=step), 2000)
    found = max(sums.mean_loss for sums in two_slopes.sums(w).values())
    line = np.linspace(-0.6, 1.4, 81)
    grid = np.stack(np.meshgrid(line, line)).reshape(2, -1)
    squares = (two_slopes.features @ grid - two_slopes.targets[:, None]) ** 2
    best = (
        np.stack([squares[rows].mean(axis=0) for rows in two_slopes.members.values()]).max(0).min()
    )
    assert found <= best + 1e-6
    assert found == pytest.approx(best, rel=0.03)  # of the grid


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("objective", [Agnostic, GroupDro])
def test_a_step_is_positive(objective, step):
    with pytest.raises(ConfigError, match=r"\.step: expected > 0, got"):
        objective(step=step)
