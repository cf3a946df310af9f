import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.unlearning.attacks import (
    attack,
    auc,
    hits_at,
    likelihood_ratio,
    logit_confidence,
    min_k_plus_plus,
    vocabulary_moments,
)


@pytest.fixture
def draws():
    return np.random.default_rng(3)


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0, 2.0])
def test_gaussian_scores_have_the_area_that_theory_says(draws, gap):
    """Of two normals a gap d apart it is Φ(d / √2); at n = 20,000 the standard error is below 0.003."""
    found = auc(draws.standard_normal(20_000) + gap, draws.standard_normal(20_000))
    assert float(found) == pytest.approx(norm.cdf(gap / np.sqrt(2)), abs=0.01)


def test_gaussian_scores_have_the_hits_that_theory_says(draws):
    found = hits_at(draws.standard_normal(50_000) + 2, draws.standard_normal(50_000))
    assert float(found) == pytest.approx(norm.sf(norm.isf(0.01) - 2), abs=0.015)


def test_area_and_hits_are_scikit_learns_ties_included(draws):
    for decimals in (0, 1, 6):
        members = (draws.standard_normal(150) + 0.7).round(decimals)
        others = draws.standard_normal(230).round(decimals)
        truth, scores = np.r_[np.ones(150), np.zeros(230)], np.r_[members, others]
        assert float(auc(members, others)) == pytest.approx(roc_auc_score(truth, scores))
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        for rate in (0.0, 0.01, 0.1, 0.5):
            assert float(hits_at(members, others, rate)) == pytest.approx(true[false <= rate].max())


def test_area_and_hits_by_hand():
    members, others = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0])
    assert float(auc(members, others)) == pytest.approx((2 + 1 + 1.5) / 6)
    assert float(hits_at(members, others, 0.0)) == pytest.approx(1 / 3)
    assert float(hits_at(members, others, 0.5)) == 1
    stacked = auc(np.stack([members, -members]), np.stack([others, -others]))
    assert stacked.tolist() == pytest.approx([0.75, 0.25])


def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 samples of 60 + 60: 95 % ± 3.8 % (3 standard errors), and the bootstrap is a little narrow."""
    truth, held = norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found = attack(rng.standard_normal(60) + 1, rng.standard_normal(60), rng, resamples=200)
        held += found.auc.low <= truth <= found.auc.high
        assert found.auc.low <= found.auc.value <= found.auc.high
    assert 0.90 <= held / 300 <= 0.99


def test_an_attack_repeats_itself_by_its_generator(draws):
    members, others = draws.standard_normal(40), draws.standard_normal(50)
    first, again, other = (attack(members, others, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other
    assert (first.members, first.others) == (40, 50)
    assert 0 <= first.low_rate_hits.low <= first.low_rate_hits.high <= 1
    wider = attack(members, others, np.random.default_rng(1), confidence=0.99)
    assert wider.auc.low < first.auc.low < first.auc.high < wider.auc.high


def test_min_k_by_hand():
    """Of five tokens the one that is least expected; of all, their mean."""
    logs, means = np.array([-1.0, -3, -2, -5, -1]), np.array([-2.0, -2, -2, -2, -2])
    deviations = np.array([1.0, 0.5, 1, 3, 0])
    assert min_k_plus_plus(logs, means, deviations, 0.2) == -2
    assert min_k_plus_plus(logs, means, deviations, 0.4) == -1.5
    assert min_k_plus_plus(logs, means, deviations, 1.0) == pytest.approx((1 - 2 + 0 - 1 + 0) / 5)
    assert min_k_plus_plus(logs[:1], means[:1], deviations[:1], 0.2) == 1


def test_tokens_that_a_model_draws_itself_stand_at_its_mean(draws):
    """E log p(x) over x ~ p is the mean, and its variance the square of the deviation."""
    logits = draws.standard_normal((4, 30)) * 2
    means, deviations = vocabulary_moments(logits)
    for place in range(4):
        p = np.exp(logits[place]) / np.exp(logits[place]).sum()
        normed = (np.log(p[draws.choice(30, 40_000, p=p)]) - means[place]) / deviations[place]
        assert normed.mean() == pytest.approx(0, abs=0.025)
        assert normed.std() == pytest.approx(1, abs=0.05)
    uniform_means, uniform_deviations = vocabulary_moments(np.zeros((1, 8)) + 900)
    assert uniform_means[0] == pytest.approx(-np.log(8))
    assert uniform_deviations[0] == pytest.approx(0, abs=1e-12)


def test_confidence_is_the_logit_and_stays_finite_at_both_ends():
    p = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(logit_confidence(-np.log(p)), np.log(p / (1 - p)), atol=1e-12)
    ends = logit_confidence(np.array([0.0, 1e-9, 800.0]))
    assert np.isfinite(ends).all()
    assert ends[2] == -800
    assert ends[0] > ends[1]


def shadow_world(rng, models, examples, gap):
    """Confidences with a difficulty of each example that is far larger than the gap of membership."""
    difficulty = 5 * rng.standard_normal(examples)
    order = np.argsort(rng.random((models, examples)), axis=0)
    inside = order < models // 2
    shadows = difficulty + gap * inside + rng.standard_normal((models, examples))
    member = rng.random(examples) < 0.5
    target = difficulty + gap * member + rng.standard_normal(examples)
    return target, shadows, inside, member


@pytest.mark.parametrize(("spread", "models"), [("shared", 256), ("example", 512)])
@pytest.mark.parametrize("gap", [1.0, 2.0])
def test_the_likelihood_ratio_reaches_the_area_that_theory_says(draws, gap, spread, models):
    """With means and deviations known it would be Φ(d / √2), whatever the difficulties; so many models know them."""
    target, shadows, inside, member = shadow_world(draws, models, 12_000, gap)
    scores = likelihood_ratio(target, shadows, inside, spread=spread)
    found = float(auc(scores[member], scores[~member]))
    assert found == pytest.approx(norm.cdf(gap / np.sqrt(2)), abs=0.01)
    by_threshold = float(auc(target[member], target[~member]))
    assert by_threshold < found - 0.1, "a threshold cannot tell easy examples from members"


def test_with_eight_models_shared_deviations_attack_better(draws):
    target, shadows, inside, member = shadow_world(draws, 8, 12_000, 2.0)
    areas = {
        spread: float(auc(scores[member], scores[~member]))
        for spread in ("shared", "example")
        for scores in [likelihood_ratio(target, shadows, inside, spread=spread)]
    }
    assert areas["shared"] > areas["example"] + 0.01


def test_the_likelihood_ratio_by_hand():
    inside = np.array([[True], [True], [True], [True], [False], [False], [False], [False]])
    shadows = np.array([[1.0], [3], [1], [3], [-1], [1], [-1], [1]])
    for spread in ("shared", "example"):
        [score] = likelihood_ratio(np.array([2.0]), shadows, inside, spread=spread)
        # both variances are 4 / 3: (2² - 0²) / (2 * 4 / 3)
        assert score == pytest.approx(1.5)


def test_models_that_all_agree_are_no_division_by_zero():
    inside = np.arange(8)[:, None] < 4
    scores = likelihood_ratio(np.array([0.5]), np.zeros((8, 1)), inside, spread="example")
    assert scores.tolist() == [0]


def test_bad_input_is_refused(draws):
    target, shadows, inside, _ = shadow_world(draws, 8, 5, 1.0)
    with pytest.raises(ConfigError, match=r"at least 8 shadow models, .* got 7"):
        likelihood_ratio(target, shadows[:7], inside[:7])
    with pytest.raises(ConfigError, match="got 8, and 0 on a side"):
        likelihood_ratio(target, shadows, np.ones_like(inside))
    with pytest.raises(ConfigError, match="expected shared or example, got 'own'"):
        likelihood_ratio(target, shadows, inside, spread="own")
    with pytest.raises(ShapeError, match=r"got \[4\], \[8, 5\] and bool \[8, 5\]"):
        likelihood_ratio(target[:4], shadows, inside)
    with pytest.raises(ShapeError, match="expected finite confidences"):
        likelihood_ratio(target * np.nan, shadows, inside)
    with pytest.raises(ShapeError, match=r"2 scores of others that are numbers, got shape \[1\]"):
        attack(target, target[:1], draws)
    with pytest.raises(ConfigError, match=r"got 0 and 0.95"):
        attack(target, target, draws, resamples=0)
    with pytest.raises(ConfigError, match=r"rate in \[0, 1\), got 1"):
        hits_at(target, target, 1)
    with pytest.raises(ShapeError, match="expected three arrays"):
        min_k_plus_plus(target, target, target[:4])
    with pytest.raises(ShapeError, match="expected finite log-probabilities"):
        min_k_plus_plus(target * np.inf, target, target)
    with pytest.raises(ConfigError, match=r"share in \(0, 1\], got 0"):
        min_k_plus_plus(target, target, target, 0)
    with pytest.raises(ShapeError, match="finite losses >= 0"):
        logit_confidence(np.array([-0.1]))
