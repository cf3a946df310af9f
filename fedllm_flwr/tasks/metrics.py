"""Quality figures from sums and counts.

Sums travel and are added; figures are computed from the sums at the end. So a figure over all clients is
never a mean of means, and clients with few rows weigh what they should.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

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

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the accuracy.

        Args:
            confidence: Two-sided coverage, in (0, 1).

        Returns:
            Lower and upper end in [0, 1]; (0, 1) when there are no rows.

        Source:
            Wilson 1927, Probable inference, the law of succession, and statistical inference.
        """
        if not self.total:
            return 0.0, 1.0
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        spread = z * z / self.total
        centre = (self.accuracy + spread / 2) / (1 + spread)
        half = math.sqrt(spread * (self.accuracy * (1 - self.accuracy) + spread / 4)) / (1 + spread)
        return max(0.0, centre - half), min(1.0, centre + half)


def pooled(parts: Sequence[Counts]) -> Counts:
    """All parts together."""
    return Counts(sum(part.correct for part in parts), sum(part.total for part in parts))


def worst(parts: Sequence[Counts]) -> float:
    """Lowest accuracy among the parts that have rows; NaN when none has."""
    return min((part.accuracy for part in parts if part.total), default=math.nan)


def worst_decile(parts: Sequence[Counts]) -> float:
    """Mean accuracy of the worst tenth of the clients that have rows, at least one client.

    Args:
        parts: Counts of each client.

    Returns:
        The unweighted mean in [0, 1]; NaN when no client has rows.

    Source:
        Li et al. 2020 (q-FFL), section 4: accuracy of the worst 10 % of devices.
    """
    ranked = sorted(part.accuracy for part in parts if part.total)
    lowest = ranked[: math.ceil(len(ranked) / 10)]
    return sum(lowest) / len(lowest) if lowest else math.nan


def largest_gap(parts: Mapping[str, Counts]) -> float:
    """Highest minus lowest accuracy among groups that have rows; NaN when none has."""
    figures = [part.accuracy for part in parts.values() if part.total]
    return max(figures) - min(figures) if figures else math.nan


def bits_per_character(loss_sum: float, characters: int) -> float:
    """Code length of the target texts; comparable between models with different vocabularies.

    Args:
        loss_sum: Sum of -ln p over all target tokens, in nats.
        characters: Characters of all target texts.

    Returns:
        Bits per character; NaN when there are no characters.
    """
    return loss_sum / (math.log(2) * characters) if characters else math.nan


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
