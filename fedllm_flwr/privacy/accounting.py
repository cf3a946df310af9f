"""The ε that Gaussian noise spends over many releases, by Google's dp-accounting.

Noise is worth what it hides. Two cases, and they must not be mixed up:

- A **sum** over examples that are drawn anew each time, each with contributions of norm C at most: adding or removing
  an example moves the sum by C, and not knowing who was drawn helps. :func:`sum_epsilon`.
- **Single** releases, such as the prompt of each example: whoever reads one knows that the example took part, so
  nothing is gained by sampling, and one example's value in place of another's moves it by 2 C.
  :func:`single_release_epsilon`.
"""

import math

from fedllm_flwr.errors import ConfigError

FINEST_GRID = 1e-4
GRID_SHARE = 1e-5
"""Spacing of the privacy loss grid, as a share of a first bound of ε: the cost grows with ε over the spacing."""


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
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    first = float(RdpAccountant().compose(event, releases).get_epsilon(delta))
    grid = max(FINEST_GRID, GRID_SHARE * first)
    exact = PLDAccountant(value_discretization_interval=grid).compose(event, releases)
    return min(first, float(exact.get_epsilon(delta)))


def _gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    if not noise_multiplier:
        return math.inf
    from dp_accounting import get_epsilon_gaussian  # seconds to import, and few runs need it

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
