import math

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
)
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import (
    accounting,
    fixed_size_epsilon,
    single_release_epsilon,
    sum_epsilon,
    sum_rdp_epsilon,
)
from fedllm_flwr.privacy.accounting import ORDERS

DELTA = 1e-5


def delta_of(epsilon: float, distance: float) -> float:
    """δ of two Gaussians of variance 1 at a distance, in closed form (Balle and Wang 2018, Theorem 8)."""
    tail = norm.cdf(-epsilon / distance - distance / 2)
    return float(norm.cdf(-epsilon / distance + distance / 2) - math.exp(epsilon) * tail)


@pytest.mark.parametrize(("sigma", "releases"), [(1.0, 1), (4.0, 10), (0.7, 3), (30.0, 1)])
def test_epsilon_is_the_analytic_one(sigma: float, releases: int) -> None:
    found = sum_epsilon(sigma, releases, DELTA)
    assert delta_of(found, math.sqrt(releases) / sigma) == pytest.approx(DELTA, rel=1e-4)
    found = single_release_epsilon(sigma, releases, DELTA)
    assert delta_of(found, 2 * math.sqrt(releases) / sigma) == pytest.approx(DELTA, rel=1e-4)


def test_a_replaced_example_moves_twice_as_far_as_an_added_one() -> None:
    assert single_release_epsilon(3.0, 5, DELTA) == sum_epsilon(1.5, 5, DELTA)


def test_sampling_helps_a_sum_and_two_accountants_agree() -> None:
    found = sum_epsilon(1.0, 40, DELTA, sampling_rate=0.1)
    event = PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0))
    bound = RdpAccountant().compose(event, 40).get_epsilon(DELTA)
    assert 0.8 * bound < found <= bound
    assert found < sum_epsilon(1.0, 40, DELTA)
    assert sum_epsilon(1.0, 20, DELTA, sampling_rate=0.1) < found
    assert found < sum_epsilon(0.9, 40, DELTA, sampling_rate=0.1)


def test_one_sampled_release_is_the_amplified_one() -> None:
    """Of one release: removing an example costs ε' = log(1 + q (e^ε - 1)) at δ' = q δ (Balle et al. 2018)."""
    whole = sum_epsilon(1.0, 1, DELTA / 0.2)
    amplified = math.log1p(0.2 * math.expm1(whole))
    assert sum_epsilon(1.0, 1, DELTA, sampling_rate=0.2) == pytest.approx(amplified, rel=1e-3)


def test_without_noise_nothing_is_private() -> None:
    assert single_release_epsilon(0.0, 1, DELTA) == math.inf
    assert sum_epsilon(0.0, 3, DELTA, sampling_rate=0.5) == math.inf


@pytest.mark.parametrize(
    "settings",
    [(-1, 1, DELTA, 1), (math.inf, 1, DELTA, 1), (1, 0, DELTA, 1), (1, 1, 0, 1), (1, 1, 1, 1), (1, 1, DELTA, 0),
     (1, 1, DELTA, 1.1), (math.nan, 1, DELTA, 1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: tuple[float, int, float, float]) -> None:
    with pytest.raises(ConfigError, match="privacy accounting: expected"):
        sum_epsilon(*settings)


def test_a_cohort_of_fixed_size_costs_more_than_one_of_coins() -> None:
    """Whoever is not drawn leaves the place to another, so the sensitivity is 2 C, and the bound is loose besides."""
    fixed = fixed_size_epsilon(4.0, 10, DELTA, 5, 50)
    assert sum_epsilon(4.0, 10, DELTA, 0.1) < fixed < single_release_epsilon(4.0, 10, DELTA)
    assert fixed_size_epsilon(4.0, 11, DELTA, 5, 50) > fixed
    assert fixed_size_epsilon(4.0, 10, DELTA, 4, 50) < fixed
    event = SampledWithoutReplacementDpEvent(50, 5, GaussianDpEvent(2.0))
    accountant = RdpAccountant(ORDERS, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    assert accountant.compose(event, 10).get_epsilon(DELTA) == fixed


def test_a_cohort_of_everybody_is_no_sample() -> None:
    assert fixed_size_epsilon(2.0, 7, DELTA, 50, 50) == sum_epsilon(2.0, 7, DELTA)


def test_weak_noise_on_a_sample_never_costs_more_than_on_everybody_replaced() -> None:
    assert fixed_size_epsilon(2.0, 100, DELTA, 25, 50) == single_release_epsilon(2.0, 100, DELTA)


@pytest.mark.parametrize("size", [0, 51])
def test_a_cohort_that_cannot_be_drawn_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected cohort_size in \[1, 50\], got {size}"):
        fixed_size_epsilon(1.0, 1, DELTA, size, 50)


CASES = [(1.0, 100, 0.1, 1e-5), (2.0, 1000, 0.01, 1e-6), (1.1, 200, 0.05, 1e-5), (1.0, 1, 0.1, 1e-5),
         (4.0, 30, 0.999, 1e-5)]  # fmt: skip
"""σ, releases, sampling rate, δ."""


@pytest.mark.parametrize(("sigma", "releases", "rate", "delta"), CASES)
def test_opacus_agrees_by_renyi_divergences(
    sigma: float, releases: int, rate: float, delta: float
) -> None:
    """The same orders and the same step to (ε, δ): only rounding is left."""
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed")
    theirs = accountants.RDPAccountant()
    theirs.history = [(sigma, rate, releases)]
    ours = sum_rdp_epsilon(sigma, releases, delta, rate)
    assert theirs.get_epsilon(delta, alphas=list(ORDERS)) == pytest.approx(ours, abs=1e-9)


@pytest.mark.parametrize(("sigma", "releases", "rate", "delta"), CASES)
def test_opacus_agrees_by_privacy_random_variables(
    sigma: float, releases: int, rate: float, delta: float
) -> None:
    """PRV against PLD: the estimates within 1e-3.

    What Opacus's ``get_epsilon`` returns is its estimate plus the error it was allowed, here 1e-3, and a little for
    the error in δ: an upper bound by construction, and the only difference above 1e-3.
    """
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed")
    theirs, error = accountants.PRVAccountant(), 1e-3
    theirs.history = [(sigma, rate, releases)]
    ours = sum_epsilon(sigma, releases, delta, rate)
    found = theirs._get_dprv(eps_error=error, delta_error=delta / 1000)
    lower, estimate, upper = found.compute_epsilon(delta, delta / 1000, error)
    assert estimate == pytest.approx(ours, abs=1e-3)
    assert lower <= ours <= upper
    assert upper - estimate < 2 * error


@pytest.mark.parametrize(("sigma", "releases", "rate"), [(0.8, 8, 0.5), (3.0, 300, 0.3)])
def test_a_grid_for_the_case_adds_next_to_nothing_to_the_finest(
    sigma: float, releases: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sum_epsilon(sigma, releases, DELTA, rate)
    monkeypatch.setattr(accounting, "GRID_SHARES", (0.0, 0.0))
    finest = sum_epsilon(sigma, releases, DELTA, rate)
    assert finest < found < finest * (1 + accounting.GRID_ERROR)


def test_renyi_divergences_bound_what_is_tight() -> None:
    for sigma, releases, rate, delta in (CASES[1], CASES[3]):
        tight = sum_epsilon(sigma, releases, delta, rate)
        assert tight <= sum_rdp_epsilon(sigma, releases, delta, rate)
    assert sum_rdp_epsilon(0.0, 1, DELTA) == math.inf
