import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import single_release_epsilon, sum_epsilon

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
