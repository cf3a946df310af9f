"""The ε that settings come to, and the noise that a wanted ε takes."""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import (
    fixed_size_epsilon,
    single_release_epsilon,
    sum_epsilon,
    sum_rdp_epsilon,
)
from fedllm_flwr.settings.adaptation import ClientConfig
from fedllm_flwr.settings.federation import cohort_size
from fedllm_flwr.settings.privacy import CentralPrivacy, LocalPrivacy

EXACT_STEPS = 1_000_000
"""Steps up to which an account is computed to the grid: a client says itself how many rows it has, and a made-up number
must not keep the server busy."""
EXACT_CLIENTS = 16
"""Clients with different accounts up to which each is computed to the grid; above it Rényi divergences bound them."""
PRECISION = 1e-3
"""Share by which the noise that is found may be more than is needed."""
MOST_NOISE = 1e6
"""Largest noise multiplier that is looked at."""

Account = tuple[float, int]
"""How a client's rows take part: the probability with which a step draws a row, and the steps."""


@lru_cache(maxsize=64)
def epsilon_of(
    privacy: CentralPrivacy | LocalPrivacy, releases: int, num_clients: int, cohort_fraction: float
) -> float:
    """The ε that one client has spent after a number of releases; 0 before the first.

    Args:
        privacy: The mechanism.
        releases: Noised sums, or noised updates of the client.
        num_clients: All clients.
        cohort_fraction: Of the clients in a round.
    """
    sigma, delta = privacy.noise_multiplier, privacy.delta
    if not releases:
        return 0.0
    if isinstance(privacy, LocalPrivacy):
        return single_release_epsilon(sigma, releases, delta)
    if privacy.cohort == "poisson":
        return sum_epsilon(sigma, releases, delta, cohort_fraction)
    size = cohort_size(num_clients, cohort_fraction)
    return fixed_size_epsilon(sigma, releases, delta, size, num_clients)


def noised_steps(client: ClientConfig, num_rows: int) -> Account:
    """How a client with so many rows trains in a round: see :func:`fedllm_flwr.training.private.plan_private`."""
    per_step = client.batch_size * client.gradient_accumulation
    epochs = max(1, client.local_epochs)
    steps = client.local_steps or epochs * math.ceil(num_rows / per_step)
    return min(num_rows, per_step) / num_rows, steps


@lru_cache(maxsize=256)
def exact_epsilon(sigma: float, steps: int, delta: float, rate: float) -> float:
    """:func:`fedllm_flwr.privacy.sum_epsilon`, kept: clients are alike, and an account is asked again each round."""
    return sum_epsilon(sigma, steps, delta, rate)


@lru_cache(maxsize=4096)
def bound_epsilon(sigma: float, steps: int, delta: float, rate: float) -> float:
    """:func:`fedllm_flwr.privacy.sum_rdp_epsilon`, kept."""
    return sum_rdp_epsilon(sigma, steps, delta, rate)


def rows_epsilon(sigma: float, delta: float, accounts: Iterable[Account]) -> float:
    """The largest ε over clients whose rows are trained on by noised steps; to the grid where they are few.

    Args:
        sigma: The noise multiplier.
        delta: δ.
        accounts: Of the clients, at least one, each with at least one step.
    """
    different = set(accounts)
    longest = max(steps for _, steps in different)
    few = len(different) <= EXACT_CLIENTS and longest <= EXACT_STEPS
    of = exact_epsilon if few else bound_epsilon
    return max(of(sigma, steps, delta, rate) for rate, steps in different)


def noise_for(
    target: float, epsilon: Callable[[float], float], bound: Callable[[float], float] | None = None
) -> float:
    """The least noise that keeps ε within a target, to four digits and :data:`PRECISION`, and never too little.

    Args:
        target: The ε wanted, > 0.
        epsilon: ε of a noise multiplier > 0; falls where that rises.
        bound: Never smaller than it and quicker, to begin with.

    Raises:
        ConfigError: No noise multiplier up to :data:`MOST_NOISE` keeps it.
    """
    high = 1.0 if bound is None else noise_for(target, bound)
    while (at_high := epsilon(high)) > target:
        high *= 2
        if high > MOST_NOISE:
            raise ConfigError(
                f"privacy.target_epsilon: expected one that noise_multiplier <= {MOST_NOISE:g} keeps, got {target:g}"
            )
    low = high / 1.25
    at_low = epsilon(low)
    while at_low <= target and low > 1 / MOST_NOISE:
        high, at_high, low = low, at_low, low / 2
        at_low = epsilon(low)
    while high > low * (1 + PRECISION):
        guess = _between(low, high, at_low, at_high, target)
        for middle in (guess * (1 + PRECISION / 3), guess / (1 + PRECISION / 3)):
            if not low < middle < high:
                continue
            found = epsilon(middle)
            if found > target:
                low, at_low = middle, found
            else:
                high, at_high = middle, found
    return rounded_up(high)


def _between(low: float, high: float, at_low: float, at_high: float, target: float) -> float:
    """Where ε would meet the target if it were a power of the noise; half way where that cannot be said."""
    if not (0 < at_high < at_low < math.inf):
        return math.sqrt(low * high)
    share = math.log(at_low / target) / math.log(at_low / at_high)
    found: float = low * (high / low) ** min(max(share, 0.02), 0.98)
    return found


def noise_for_rows(target: float, delta: float, accounts: Iterable[Account]) -> float:
    """The same for clients whose rows are trained on by noised steps; see :func:`rows_epsilon`.

    The client that has it worst is looked for by bounds, which are quick, and the noise is found for it alone; only if
    another has it worse at that noise is it looked for among all.
    """
    different = set(accounts)

    def bound(sigma: float) -> float:
        return max(bound_epsilon(sigma, n, delta, q) for q, n in different)

    first = noise_for(target, bound)
    worst = max(different, key=lambda account: bound_epsilon(first, account[1], delta, account[0]))
    found = noise_for(target, lambda sigma: rows_epsilon(sigma, delta, [worst]), bound)
    if rows_epsilon(found, delta, different) <= target:
        return found
    return noise_for(target, lambda sigma: rows_epsilon(sigma, delta, different), bound)


def rounded_up(value: float) -> float:
    """The next number with four digits, not below it; value > 0."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.4g}")
