import numpy as np
import pytest
from flwr.serverapp.strategy.qfedavg import compute_delta_and_h
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.averaging import RunningMean
from fedllm_flwr.errors import ConfigError, ShapeError, WireError
from fedllm_flwr.fairness import QFairMean

RATE = 0.1


def step(updates, losses, q, weights=None, rate=RATE):
    mean = QFairMean(len(updates[0]), q=q, learning_rate=rate)
    for i, (update, loss) in enumerate(zip(updates, losses, strict=True)):
        mean.add(
            np.asarray(update, np.float64), loss, weight=1.0 if weights is None else weights[i]
        )
    return mean.result()


def test_the_step_by_hand():
    """q = 1, L = 10: numerator 2·1 - 1·3 = -1, denominator (2 + 10·1) + (1 + 10·9) = 103."""
    assert step([[1.0], [-3.0]], [2.0, 1.0], q=1) == pytest.approx([-1 / 103])


@pytest.mark.parametrize("q", [0.0, 0.2, 1.0, 2.0, 5.0])
def test_flowers_formula_gives_the_same_step(q):
    rng = np.random.default_rng(3)
    start, updates = rng.normal(size=7), rng.normal(0, 0.1, size=(4, 7))
    losses = rng.uniform(0.05, 3, 4)
    pairs = [
        compute_delta_and_h([start.copy()], [start + update], q, 1 / RATE, float(loss))
        for update, loss in zip(updates, losses, strict=True)
    ]
    theirs = start - sum(delta[0] for delta, _ in pairs) / sum(h for _, h in pairs)
    np.testing.assert_allclose(start + step(updates, losses, q), theirs, rtol=1e-6, atol=1e-8)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 5), st.integers(1, 99)), min_size=1))
@settings(deadline=None)
def test_without_q_it_is_the_mean_whatever_the_losses(clients):
    updates = [np.array([update], np.float32) for update, _, _ in clients]
    losses, weights = [c[1] for c in clients], [float(c[2]) for c in clients]
    plain, weighted = RunningMean(1), RunningMean(1)
    for update, weight in zip(updates, weights, strict=True):
        plain.add(update, 1.0)
        weighted.add(update, weight)
    assert step(updates, losses, 0.0) == pytest.approx(plain.result(), abs=1e-6)
    assert step(updates, losses, 0.0, weights) == pytest.approx(weighted.result(), abs=1e-6)


def test_as_q_goes_to_zero_the_step_goes_to_the_mean():
    updates, losses = [[1.0, 0.0], [0.0, 2.0]], [0.3, 2.5]
    distances = [abs(step(updates, losses, q) - [0.5, 1.0]).max() for q in (1e-2, 1e-3, 1e-4)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] == pytest.approx(distances[1] / 10, rel=0.1)


def test_more_q_favours_the_client_with_the_larger_loss():
    updates, losses = [[1.0, 0.0], [0.0, 1.0]], [0.5, 2.0]
    ratios = [np.divide(*step(updates, losses, q)[::-1]) for q in (0.0, 1.0, 2.0)]
    assert ratios == pytest.approx([1.0, 4.0, 16.0])


def test_rounds_lead_to_the_minimum_of_its_own_objective():
    """Σ F_k^(q+1) for F_1 = w² and F_2 = 2(w - 1)² + 0.1, by one gradient step a round."""
    q, w = 2.0, 0.0
    for _ in range(4000):
        losses = [w**2, 2 * (w - 1) ** 2 + 0.1]
        updates = [[-0.05 * 2 * w], [-0.05 * 4 * (w - 1)]]
        w += float(step(updates, losses, q, rate=0.05)[0])
    line = np.linspace(0, 1, 100_001)
    total = line ** (2 * (q + 1)) + (2 * (line - 1) ** 2 + 0.1) ** (q + 1)
    assert w == pytest.approx(line[total.argmin()], abs=1e-3)


def test_a_loss_of_zero_is_no_division_by_zero():
    found = step([[1.0], [2.0]], [0.0, 1.0], q=0.5)
    assert np.isfinite(found).all()
    assert found[0] > 0


@pytest.mark.parametrize(
    ("update", "loss", "weight", "error", "message"),
    [
        (np.zeros(3), 1.0, 1.0, ShapeError, r"expected shape \(2,\), got \(3,\)"),
        (np.zeros(2, int), 1.0, 1.0, WireError, "expected float16, float32 or float64, got int64"),
        (np.array([np.nan, 0.0]), 1.0, 1.0, WireError, "expected finite values, got 1 of 2"),
        (np.zeros(2), -0.1, 1.0, WireError, "start loss: expected a finite number >= 0, got -0.1"),
        (np.zeros(2), np.inf, 1.0, WireError, "start loss: expected a finite number >= 0, got inf"),
        (
            np.zeros(2),
            1e200,
            1.0,
            WireError,
            "start loss: expected one whose power q=2 is above 0 and finite",
        ),
        (np.zeros(2), 1.0, 0.0, WireError, "weight: expected a number above 0"),
    ],
)
def test_a_refused_client_is_named_and_leaves_the_sums(update, loss, weight, error, message):
    mean = QFairMean(2, q=2.0, learning_rate=RATE)
    mean.add(np.array([1.0, 2.0]), 0.5)
    before = mean.result()
    with pytest.raises(error, match=f"^client 9: {message}"):
        mean.add(update, loss, weight=weight, client=9)
    assert mean.count == 1
    np.testing.assert_array_equal(mean.result(), before)


def test_impossible_settings_and_an_empty_cohort_are_refused():
    with pytest.raises(ConfigError, match="expected a size > 0, got 0"):
        QFairMean(0, q=1.0, learning_rate=RATE)
    with pytest.raises(ConfigError, match=r"expected q >= 0, got -1\.0"):
        QFairMean(1, q=-1.0, learning_rate=RATE)
    with pytest.raises(ConfigError, match=r"expected a learning rate > 0, got 0\.0"):
        QFairMean(1, q=1.0, learning_rate=0.0)
    with pytest.raises(WireError, match="expected at least one client, got none"):
        QFairMean(1, q=1.0, learning_rate=RATE).result()


def test_a_loss_whose_power_vanishes_is_refused_and_does_not_make_the_step_nan():
    mean = QFairMean(1, q=60.0, learning_rate=RATE)
    with pytest.raises(
        WireError, match="client 7: start loss: expected one whose power q=60 is above 0"
    ):
        mean.add(np.ones(1), 0.0, client=7)
    mean.add(np.ones(1), 1.0)
    assert np.isfinite(mean.result()).all()
