"""Least squares over groups with a known minimum, so that a best response is exact."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest

from fedllm_flwr.fairness import GroupSums


@dataclass(frozen=True)
class LeastSquares:
    """Rows (x, y) of named groups; the loss of a row is (x·w - y)²."""

    features: np.ndarray
    targets: np.ndarray
    groups: np.ndarray

    @cached_property
    def counts(self):
        names, counts = np.unique(self.groups, return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    @cached_property
    def members(self):
        """By group, which rows are in it."""
        return {group: self.groups == group for group in self.counts}

    def fit(self, weights):
        """The w that minimises the mean of the weighted losses."""
        root = np.sqrt(sum(weights[group] * rows for group, rows in self.members.items()))
        return np.linalg.lstsq(self.features * root[:, None], self.targets * root, rcond=None)[0]

    def sums(self, w):
        """Every group's sums at w; a row counts as correct within half a unit."""
        residuals = self.features @ w - self.targets
        return {
            group: GroupSums(
                float((residuals[rows] ** 2).sum()),
                int((abs(residuals[rows]) < 0.5).sum()),
                int(rows.sum()),
            )
            for group, rows in self.members.items()
        }

    def ascend(self, objective, rounds):
        """Multipliers against exact best responses; the last state and the w that answers it.

        Ends before all rounds are done where nothing moves any more: every further round would be the same.
        """
        state = objective.start(self.counts)
        for _ in range(rounds):
            w = self.fit(objective.row_weights(state, self.counts))
            before, state = state, objective.update(state, self.sums(w))
            if max(abs(state[group] - before[group]) for group in state) < 1e-13:
                break
        return state, self.fit(objective.row_weights(state, self.counts))


@pytest.fixture(scope="session")
def two_points():
    """60 rows at 0 and 20 at 1: r_a = w², r_b = (1 - w)², without constraint w = 1/4."""
    return LeastSquares(
        np.ones((80, 1)), np.repeat([0.0, 1.0], [60, 20]), np.repeat(["a", "b"], [60, 20])
    )


@pytest.fixture(scope="session")
def two_slopes():
    """120 rows of a plane in two features and 40 of another one, with noise."""
    rng = np.random.default_rng(5)
    features = rng.normal(size=(160, 2))
    groups = np.repeat(["a", "b"], [120, 40])
    planes = np.where((groups == "a")[:, None], [1.0, -0.5], [0.2, 0.1])
    targets = (features * planes).sum(axis=1) + 0.2 * rng.normal(size=160)
    return LeastSquares(features, targets, groups)


@pytest.fixture(scope="session")
def two_halves():
    """Signs of two lines in the plane: 240 rows of one group and 80 of another."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(320, 2))
    groups = np.repeat(["a", "b"], [240, 80])
    lines = np.where((groups == "a")[:, None], [1.0, 0.0], [1.0, 1.5])
    return LeastSquares(features, np.sign((features * lines).sum(axis=1)), groups)
