"""Latency of a batching server under random arrivals, in virtual time: how long requests wait for each other.

The policy is that of :class:`fedllm_flwr.batching.batch.Batcher`. What a batch takes is told, for instance from CPU
seconds that were measured, so a busy machine does not spoil the figures.

Axes: n requests.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.batching.batch import MAX_BATCH, MAX_WAIT_SECONDS
from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Served:
    """What became of the requests.

    Attributes:
        seconds: From each request's arrival to its answer. float64 [n]
        sizes: Of the batches, in their order.
        until: When the last answer was there, in seconds after the start.
    """

    seconds: np.ndarray
    sizes: tuple[int, ...]
    until: float

    @property
    def percentiles(self) -> dict[str, float]:
        """p50, p95 and p99 of the requests' times."""
        found = np.percentile(self.seconds, (50, 95, 99))
        return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))


def poisson_arrivals(
    per_second: float, requests: int, generator: np.random.Generator
) -> np.ndarray:
    """Times at which requests arrive, independent of each other, ascending; float64 [n].

    Args:
        per_second: Mean rate, above 0.
        requests: n, at least 1.
        generator: Draws the gaps.

    Raises:
        ConfigError: A number is out of range.
    """
    if not per_second > 0 or requests < 1:
        raise ConfigError(
            f"arrivals: expected a rate above 0 and at least one request, got {per_second} and {requests}"
        )
    found: np.ndarray = np.cumsum(generator.exponential(1 / per_second, requests))
    return found


def serve_arrivals(
    arrivals: np.ndarray,
    batch_seconds: Callable[[int], float],
    *,
    max_batch: int = MAX_BATCH,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
) -> Served:
    """Serve requests in batches, one batch at a time, none refused.

    Args:
        arrivals: Ascending times. [n]
        batch_seconds: What a batch of so many requests takes.
        max_batch: A batch is begun when so many wait,
        max_wait_seconds: or when the oldest one has waited so long.

    Raises:
        ConfigError: A number is out of range, or the times do not ascend.
    """
    if max_batch < 1 or max_wait_seconds < 0:
        raise ConfigError(
            f"batch: expected max_batch >= 1 and max_wait_seconds >= 0, got {max_batch} and {max_wait_seconds}"
        )
    if not arrivals.size or (np.diff(arrivals) < 0).any():
        raise ConfigError("arrivals: expected ascending times of at least one request")
    seconds, sizes, free, first = np.zeros(arrivals.size), [], 0.0, 0
    while first < arrivals.size:
        last = first + max_batch - 1
        full = arrivals[last] if last < arrivals.size else np.inf
        begin = max(free, min(full, arrivals[first] + max_wait_seconds))
        there = int(np.searchsorted(arrivals, begin, side="right")) - first
        size = min(max_batch, there)
        free = begin + batch_seconds(size)
        seconds[first : first + size] = free - arrivals[first : first + size]
        sizes.append(size)
        first += size
    return Served(seconds, tuple(sizes), float(free))
