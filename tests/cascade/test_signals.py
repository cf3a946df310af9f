import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fedllm_flwr.cascade import TierOutcomes
from fedllm_flwr.cascade.signals import (
    aurc,
    auroc,
    deferral_auroc,
    deferral_gain,
    error_correlation,
    mean_error_correlation,
)
from fedllm_flwr.errors import ShapeError

Draw = Callable[..., tuple[np.ndarray, np.ndarray]]
pairs = st.lists(
    st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=2, max_size=30
)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@given(pairs)
@settings(deadline=None)
def test_the_auroc_is_scikit_learns(answers: list[tuple[int, bool, bool]]) -> None:
    levels, correct, _ = (np.array(column) for column in zip(*answers, strict=True))
    if 0 < correct.sum() < correct.size:
        assert auroc(levels, correct) == pytest.approx(roc_auc_score(correct, levels))
    else:
        assert math.isnan(auroc(levels, correct))


@pytest.mark.parametrize("seed", range(3))
def test_clones_agree_and_say_nothing(
    seed: int, draw_labels: Draw, make_tier: Callable[..., TierOutcomes]
) -> None:
    labels, truth = draw_labels(600, 5, seed, shared=True)
    found = make_tier(labels.tolist(), truth.tolist())
    assert found.level.min() == 1
    assert 0.4 < found.correct.mean() < 0.8
    ranking = deferral_auroc(found.level, found.correct, generator())
    assert abs(ranking.value - 0.5) <= 0.05
    assert abs(ranking.low - 0.5) <= 0.05 >= abs(ranking.high - 0.5)
    np.testing.assert_allclose(error_correlation(labels == truth[:, None]), 1)


@pytest.mark.parametrize("seed", range(3))
def test_members_that_differ_say_something(
    seed: int, draw_labels: Draw, make_tier: Callable[..., TierOutcomes]
) -> None:
    labels, truth = draw_labels(600, 5, seed)
    found = make_tier(labels.tolist(), truth.tolist())
    ranking = deferral_auroc(found.level, found.correct, generator())
    assert 0.5 < ranking.low < ranking.value < ranking.high
    assert mean_error_correlation(labels == truth[:, None]) < 0.5


def test_coins_agree_now_and_then_but_say_nothing(make_tier: Callable[..., TierOutcomes]) -> None:
    """Members that guess: agreement varies, and whether it is right does not depend on it."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 3000).astype(str)
    levels = rng.integers(0, 2, (3000, 5)).astype(str)
    found = make_tier(levels.tolist(), truth.tolist())
    assert np.unique(found.level).size == 3
    assert abs(auroc(found.level, found.correct) - 0.5) <= 0.05


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Two Gaussians one standard deviation apart: AUROC Φ(1/√2) = 0.760."""
    rng, truth, covered = np.random.default_rng(2), 0.7602, 0
    for _ in range(60):
        correct = rng.random(120) < 0.6
        levels = rng.normal(correct.astype(float), 1)
        found = deferral_auroc(levels, correct, rng, confidence=0.9, replicates=200)
        covered += found.low <= truth <= found.high
    assert 45 <= covered <= 60


def test_intervals_of_nothing_to_rank_do_not_exist() -> None:
    found = deferral_auroc(np.ones(3), np.ones(3, bool), generator())
    assert all(math.isnan(value) for value in (found.value, found.low, found.high))


def test_selective_risk_by_hand() -> None:
    # Ranked: right, right, wrong: risks 0, 0, 1/3.
    assert aurc(np.array([0.9, 0.5, 0.7]), np.array([1, 0, 1])) == pytest.approx(1 / 9)
    # One group of three with one error: each prefix is wrong in a third on average.
    assert aurc(np.ones(3), np.array([1, 0, 1])) == pytest.approx(1 / 3)


@given(pairs)
@settings(deadline=None)
def test_levels_that_say_nothing_have_the_error_rate_as_risk_and_no_gain(
    answers: list[tuple[int, bool, bool]],
) -> None:
    levels, first, last = (np.array(column) for column in zip(*answers, strict=True))
    flat = np.zeros(len(answers))
    assert aurc(flat, first) == pytest.approx(1 - first.mean())
    assert (
        math.isnan(deferral_gain(flat, first, last)) or abs(deferral_gain(flat, first, last)) < 1e-9
    )
    perfect = deferral_gain(-(last.astype(float) - first), first, last)
    assert math.isnan(perfect) or perfect == pytest.approx(1)
    found = deferral_gain(levels, first, last)
    assert math.isnan(found) or -1 - 1e-9 <= found <= 1 + 1e-9


def test_the_gain_by_hand() -> None:
    first, last = np.array([1, 0, 0, 1], bool), np.array([1, 1, 0, 0], bool)
    # Gains 0, 1, 0, -1: perfect order 1, 0, 0, -1 gives the curve 0 1 1 1 0, of area 3; random 0.
    assert deferral_gain(np.array([0.9, 0.1, 0.2, 0.8]), first, last) == pytest.approx(2 / 3)
    assert math.isnan(deferral_gain(np.arange(4.0), first, first))


def test_error_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random((50, 3)) < 0.6
    np.testing.assert_allclose(error_correlation(correct), np.corrcoef(correct.T))
    always_right = np.column_stack([correct[:, :2], np.ones(50, bool)])
    assert np.isnan(error_correlation(always_right)[2]).all()
    assert mean_error_correlation(always_right) == pytest.approx(
        np.corrcoef(correct[:, :2].T)[0, 1]
    )
    assert math.isnan(mean_error_correlation(correct[:, :1]))


def test_what_does_not_fit_together_is_refused() -> None:
    for found in (auroc, aurc):
        with pytest.raises(ShapeError, match="levels and answers of one length > 0"):
            found(np.ones(2), np.ones(3))
    with pytest.raises(ShapeError, match="levels and answers of one length > 0"):
        deferral_gain(np.ones(2), np.ones(2), np.ones(3))
    with pytest.raises(ShapeError, match=r"expected \[queries, members\], got \[3\]"):
        error_correlation(np.ones(3))
