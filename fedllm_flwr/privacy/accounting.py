"""The ε that Gaussian noise spends over many releases, by Google's dp-accounting.

Noise is worth what it hides. Three cases, and they must not be mixed up:

- A **sum** over examples that are drawn anew each time, each by itself, with contributions of norm C at most: adding
  or removing an example moves the sum by C, and not knowing who was drawn helps. :func:`sum_epsilon`.
- A **sum** over a cohort of fixed size, drawn without replacement: with another example in its place the sum moves by
  2 C, and so it may when an example is gone, since another is drawn instead. :func:`fixed_size_epsilon`.
- **Single** releases, such as the prompt of each example: whoever reads one knows that the example took part, so
  nothing is gained by sampling, and one example's value in place of another's moves it by 2 C.
  :func:`single_release_epsilon`.

An example is whatever one contribution is made of: a row, or a client with all of its rows.
"""

import math

from fedllm_flwr.errors import ConfigError

FINEST_GRID = 1e-4
GRID_SHARES = (1e-5, 1e-3)
"""Least and largest spacing of the privacy loss grid, as shares of a first bound of ε: the cost grows with ε over the
spacing."""
GRID_ERROR = 2e-5
"""Share of ε that rounding to the grid may add, about: each release adds something like the square of the spacing."""
ORDERS = (*range(2, 65), 128, 256, 512, 1024)
"""Of Rényi divergences. For whole orders the sampled Gaussian's is a finite sum, for others a series that may fail."""


def single_release_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """ε of one example whose clipped and noised values are sent a number of times, when it may be any other.

    Args:
        noise_multiplier: σ of :func:`fedllm_flwr.privacy.noise.clip_and_noise`, relative to the clipping norm C.
        releases: How often the example is sent, as a rule once an epoch.
        delta: Probability δ that may be left over, in (0, 1).

    Returns:
        ε >= 0, exact; infinite without noise.

    Raises:
        ConfigError: A setting is out of range.

    Source:
        Balle and Wang 2018, Improving the Gaussian mechanism, Theorem 8, with sensitivity 2 C; Dong et al. 2022,
        Gaussian differential privacy, Corollary 3.3, for the composition σ / sqrt(releases).
    """
    _check(noise_multiplier, releases, delta, 1.0)
    return _gaussian_epsilon(noise_multiplier / 2, releases, delta)


def sum_epsilon(
    noise_multiplier: float, releases: int, delta: float, sampling_rate: float = 1.0
) -> float:
    """ε of releasing noised sums over examples, when an example may be added or removed.

    Args:
        noise_multiplier: Standard deviation of the sum's noise over the norm C of an example's contribution.
        releases: Sums, for example rounds.
        delta: δ, in (0, 1).
        sampling_rate: Probability with which each example is drawn for a sum, by itself (Poisson), in (0, 1].

    Returns:
        ε >= 0: exact at rate 1, below it an upper bound that is tight to the grid; infinite without noise.

    Raises:
        ConfigError: A setting is out of range.

    Source:
        Koskela et al. 2020, Computing tight differential privacy guarantees using FFT, for privacy loss distributions;
        Mironov et al. 2019, Rényi differential privacy of the sampled Gaussian mechanism, for the first bound.
    """
    _check(noise_multiplier, releases, delta, sampling_rate)
    if sampling_rate == 1 or not noise_multiplier:
        return _gaussian_epsilon(noise_multiplier, releases, delta)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent  # seconds, and few runs do
    from dp_accounting.pld import PLDAccountant

    event = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    first = sum_rdp_epsilon(noise_multiplier, releases, delta, sampling_rate)
    accountant = PLDAccountant(value_discretization_interval=_grid(first, releases))
    exact = accountant.compose(event, releases)
    return min(first, float(exact.get_epsilon(delta)))


def _grid(bound: float, releases: int) -> float:
    """The spacing of the grid for so many releases, whose ε is at most a bound."""
    least, largest = (share * bound for share in GRID_SHARES)
    return max(FINEST_GRID, least, min(largest, math.sqrt(GRID_ERROR * bound / releases)))


def sum_rdp_epsilon(
    noise_multiplier: float, releases: int, delta: float, sampling_rate: float = 1.0
) -> float:
    """The same as :func:`sum_epsilon` by Rényi divergences: never smaller, quick, and easy to check elsewhere.

    Args:
        noise_multiplier: As there.
        releases: As there.
        delta: As there.
        sampling_rate: As there.

    Returns:
        ε >= 0, the least over :data:`ORDERS`; infinite without noise.

    Raises:
        ConfigError: A setting is out of range.

    Source:
        Mironov et al. 2019, Rényi differential privacy of the sampled Gaussian mechanism; Canonne et al. 2020, The
        discrete Gaussian for differential privacy, Proposition 12, for the step to (ε, δ).
    """
    _check(noise_multiplier, releases, delta, sampling_rate)
    if not noise_multiplier:
        return math.inf
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    return float(RdpAccountant(ORDERS).compose(event, releases).get_epsilon(delta))


def fixed_size_epsilon(
    noise_multiplier: float, releases: int, delta: float, cohort_size: int, num_examples: int
) -> float:
    """ε of noised sums over cohorts of one size, drawn without replacement, when an example may be any other.

    Args:
        noise_multiplier: Standard deviation of the sum's noise over the norm C of an example's contribution.
        releases: Sums, for example rounds.
        delta: δ, in (0, 1).
        cohort_size: Examples of one sum, in [1, num_examples].
        num_examples: All examples; their number is no secret.

    Returns:
        ε >= 0: an upper bound, and a loose one. Of everybody it is exact, and then it holds for an example that is
        taken out of the sum (not replaced), as :func:`sum_epsilon` does.

    Raises:
        ConfigError: A setting is out of range.

    Source:
        Wang et al. 2019, Subsampled Rényi differential privacy and analytical moments accountant, Theorem 27, with
        sensitivity 2 C. No bound with C alone holds: whoever is not drawn leaves the place to somebody else.
    """
    _check(noise_multiplier, releases, delta, 1.0)
    if not 1 <= cohort_size <= num_examples:
        raise ConfigError(
            f"privacy accounting: expected cohort_size in [1, {num_examples}], got {cohort_size}"
        )
    if cohort_size == num_examples or not noise_multiplier:
        return _gaussian_epsilon(noise_multiplier, releases, delta)
    from dp_accounting import (
        GaussianDpEvent,
        NeighboringRelation,
        SampledWithoutReplacementDpEvent,
    )
    from dp_accounting.rdp import RdpAccountant

    event = SampledWithoutReplacementDpEvent(
        num_examples, cohort_size, GaussianDpEvent(noise_multiplier / 2)
    )
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_ONE).compose(event, releases)
    # the bound is loose where noise is weak, and sampling never hurts
    unsampled = _gaussian_epsilon(noise_multiplier / 2, releases, delta)
    return min(float(accountant.get_epsilon(delta)), unsampled)


def _gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    if not noise_multiplier:
        return math.inf
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(releases), delta))


def _check(noise_multiplier: float, releases: int, delta: float, sampling_rate: float) -> None:
    if not 0 <= noise_multiplier < math.inf or releases < 1:
        raise ConfigError(
            f"privacy accounting: expected a finite noise_multiplier >= 0 and releases >= 1, "
            f"got {noise_multiplier} and {releases}"
        )
    if not 0 < delta < 1 or not 0 < sampling_rate <= 1:
        raise ConfigError(
            f"privacy accounting: expected delta in (0, 1) and sampling_rate in (0, 1], "
            f"got {delta} and {sampling_rate}"
        )
