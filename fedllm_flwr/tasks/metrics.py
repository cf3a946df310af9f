"""Quality figures from sums and counts.

Sums travel and are added; figures are computed from the sums at the end. So a figure over all clients is
never a mean of means, and clients with few rows weigh what they should.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Counts:
    """Hits among trials; add counts before asking for a figure.

    Attributes:
        correct: Rows that were answered as their label says.
        total: Rows that were asked.
    """

    correct: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        """Check that the counts are possible.

        Raises:
            ShapeError: Not 0 <= correct <= total.
        """
        if not 0 <= self.correct <= self.total:
            raise ShapeError(
                f"counts: expected 0 <= correct <= total, got {self.correct} of {self.total}"
            )

    def __add__(self, other: "Counts") -> "Counts":
        """The counts of both together."""
        return Counts(self.correct + other.correct, self.total + other.total)

    @property
    def accuracy(self) -> float:
        """Share of correct rows in [0, 1]; NaN when there are no rows."""
        return self.correct / self.total if self.total else math.nan


def pooled(parts: Sequence[Counts]) -> Counts:
    """All parts together."""
    return Counts(sum(part.correct for part in parts), sum(part.total for part in parts))


def accuracies(parts: Sequence[Counts]) -> list[float]:
    """Accuracy of each part that has rows, in their order."""
    return [part.accuracy for part in parts if part.total]


def count_correct(predictions: np.ndarray, labels: np.ndarray) -> Counts:
    """Compare predicted with true labels.

    Args:
        predictions: Label indices. [rows]
        labels: Label indices. [rows]

    Raises:
        ShapeError: The shapes differ.
    """
    if predictions.shape != labels.shape:
        raise ShapeError(
            f"predictions: expected the labels' shape {labels.shape}, got {predictions.shape}"
        )
    return Counts(int(np.sum(predictions == labels)), int(labels.size))
