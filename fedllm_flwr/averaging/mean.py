"""Weighted mean of flat arrays that arrive one at a time.

Axes: n = floats in one contribution. Contributions are float16, float32 or float64, and always summed in float64.
"""

import numpy as np

from fedllm_flwr.averaging.checks import check_values, check_weight
from fedllm_flwr.errors import ShapeError, WireError

# Floats worked on at a time: bounds the float64 scratch to 1 MiB, which stays in cache beside its slice of the sum.
BLOCK = 131_072


class RunningMean:
    """Weighted mean Σ wₖ xₖ / Σ wₖ of flat arrays, in memory that does not depend on how many there are.

    A contribution that is refused leaves the sums as they were, so the caller can drop it and go on. The order of
    contributions changes the result by float64 rounding only; callers that need equal bits sort them first.

    Source:
        McMahan et al. 2017, Algorithm 1, last line. Differs in that weights are divided out at the end, and in that
        sums are float64 whatever the dtype of the contributions.
    """

    def __init__(self, size: int) -> None:
        """Start an empty mean.

        Args:
            size: Floats in each contribution (n), > 0.

        Raises:
            ValueError: The size is not positive.
        """
        if size <= 0:
            raise ValueError(f"size: expected > 0, got {size}")
        self.count = 0
        self.total_weight = 0.0
        self._sum = np.zeros(size)
        self._block = np.empty(min(size, BLOCK))

    def add(self, values: np.ndarray, weight: float, *, client: int | str | None = None) -> None:
        """Add one contribution; it is read once and not kept.

        Args:
            values: The contribution, [n], float16, float32 or float64.
            weight: Its unnormalised weight, > 0.
            client: Who sent it, for messages; defaults to the number of contributions before it.

        Raises:
            ShapeError: The shape is not [n]; names the client.
            WireError: The dtype, a value or the weight is refused; names the client.
        """
        who = f"client {self.count if client is None else client}"
        if values.shape != self._sum.shape:
            raise ShapeError(f"{who}: expected shape {self._sum.shape}, got {values.shape}")
        checked = check_weight(weight, who)
        check_values(values, who)
        for start in range(0, values.size, BLOCK):
            part = values[start : start + BLOCK]
            block = self._block[: part.size]
            block[...] = part  # widen before multiplying: half precision overflows at 65504
            block *= checked
            self._sum[start : start + BLOCK] += block
        self.count += 1
        self.total_weight += checked

    def result(self) -> np.ndarray:
        """The mean so far, as a new float32 array [n]; more contributions may follow.

        Raises:
            WireError: Nothing was added.
        """
        if not self.count:
            raise WireError("mean: expected at least one client, got none (the total weight is 0)")
        return (self._sum / self.total_weight).astype(np.float32)
