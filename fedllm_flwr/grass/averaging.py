"""The mean of what clients have changed in their rows, whether all trained the same rows or each its own.

Axes: k rows that some client has changed, n values of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm_flwr.errors import WireError
from fedllm_flwr.grass.rows import RowUpdate

RowAverage = Literal["clients", "counts"]
"""What a row's sum is divided by: the weight of all clients, or of those that changed the row."""


@dataclass(eq=False)
class _Sum:
    """Of one matrix: rows [k], sums [k, n] and weights [k], all float64 but the indices."""

    indices: np.ndarray
    values: np.ndarray
    weights: np.ndarray


class RowMean:
    """A weighted mean of row updates that arrive one at a time; sums are float64.

    With ``clients`` a row that a client has not changed counts as changed by 0. So where each client draws its own rows
    by a rule with E[P Pᵀ] = I and makes one SGD step, the mean is an unbiased estimate of the mean of all clients'
    whole steps. With ``counts`` a row moves by the mean of those that changed it: further, and biased under every
    rule, since the chance of being chosen is not divided out twice. Where all clients train the same rows both are
    the same.

    Args:
        average: What sums are divided by.
    """

    def __init__(self, average: RowAverage) -> None:
        self.count = 0
        self.total_weight = 0.0
        self._average = average
        self._sums: dict[str, _Sum] = {}

    def add(self, updates: Mapping[str, RowUpdate], weight: float) -> None:
        """Add one client's updates.

        Args:
            updates: By matrix; finite.
            weight: What the client counts, > 0.
        """
        for name, update in updates.items():
            found = self._room(name, update)
            places = np.searchsorted(found.indices, update.indices)
            found.values[places] += weight * update.values.astype(np.float64)
            found.weights[places] += weight
        self.count += 1
        self.total_weight += weight

    def result(self) -> dict[str, RowUpdate]:
        """The mean update by matrix, over the rows that any client has changed.

        Raises:
            WireError: Nothing was added.
        """
        if not self.count:
            raise WireError("mean of rows: expected at least one client, got none")
        means = {}
        for name, found in self._sums.items():
            weights = found.weights[:, None] if self._average == "counts" else self.total_weight
            means[name] = RowUpdate(found.indices, (found.values / weights).astype(np.float32))
        return means

    def _room(self, name: str, update: RowUpdate) -> _Sum:
        """A matrix's sums, with a place for each row of an update."""
        before = self._sums.get(name)
        if before is not None and np.isin(update.indices, before.indices).all():
            return before
        old = np.zeros(0, np.int64) if before is None else before.indices
        indices = np.union1d(old, update.indices)
        found = _Sum(
            indices, np.zeros((len(indices), update.values.shape[1])), np.zeros(len(indices))
        )
        if before is not None:
            places = np.searchsorted(indices, old)
            found.values[places], found.weights[places] = before.values, before.weights
        self._sums[name] = found
        return found
