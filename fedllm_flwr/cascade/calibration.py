"""From which agreement on a tier may answer, for a stated risk, from counts that may come from many places.

Everything that the choice needs is, for each bin of agreement, how many held-out queries fell into it and how many of
them were right. Such histograms add up, so clients can answer with theirs and keep queries, answers and labels.

Axes: b bins of agreement, n queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import betaincinv

from fedllm_flwr.errors import ConfigError, ShapeError

Among = Literal["accepted", "all"]
ALWAYS_DEFER = math.inf
"""The threshold that no agreement reaches."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many queries were answered at each agreement, and how many of them rightly.

    Attributes:
        edges: Least level of each bin, ascending. A bin ends where the next begins, the last has no end. For votes of
            k members take all their levels (:func:`fedllm_flwr.cascade.agreement.levels_of`). [b]
        correct: Right answers in each bin. int64 [b]
        total: Answers in each bin. int64 [b]

    Raises:
        ShapeError: The lengths differ, the edges do not ascend, or a bin has more right answers than answers.
    """

    edges: tuple[float, ...]
    correct: np.ndarray
    total: np.ndarray

    def __post_init__(self) -> None:
        for name in ("correct", "total"):
            counts = np.asarray(getattr(self, name))
            if counts.shape != (len(self.edges),) or not np.issubdtype(counts.dtype, np.integer):
                raise ShapeError(
                    f"histogram: expected {name} as {len(self.edges)} integers, got {counts.dtype} {list(counts.shape)}"
                )
            object.__setattr__(self, name, counts.astype(np.int64))
        check_edges(self.edges)
        if (self.correct < 0).any() or (self.correct > self.total).any():
            raise ShapeError(
                f"histogram: expected 0 <= correct <= total, got {self.correct} of {self.total}"
            )

    def __add__(self, other: "Histogram") -> "Histogram":
        """The counts of both together.

        Raises:
            ShapeError: The edges differ.
        """
        if self.edges != other.edges:
            raise ShapeError(f"histogram: expected edges {self.edges}, got {other.edges}")
        return Histogram(self.edges, self.correct + other.correct, self.total + other.total)


def check_edges(edges: Sequence[float]) -> None:
    """Check that there are edges, finite and ascending.

    Raises:
        ShapeError: They are not.
    """
    steps = np.diff(np.asarray(edges, np.float64))
    if not len(edges) or not np.isfinite(edges).all() or not (steps > 0).all():
        raise ShapeError(f"histogram: expected ascending finite edges, got {tuple(edges)}")


def histogram(levels: np.ndarray, correct: np.ndarray, edges: Sequence[float]) -> Histogram:
    """Count answers by their agreement.

    Args:
        levels: Agreement of each query. [n]
        correct: Whether what the tier would answer is right: by a gold label, or by the large model's answer where
            there is none. [n]
        edges: Of the bins. A query below the first edge counts nowhere: hand in an edge at the least level.

    Raises:
        ShapeError: The lengths differ, the edges do not ascend, or a level lies below the first edge.
    """
    check_edges(edges)
    if levels.shape != correct.shape or levels.ndim != 1:
        raise ShapeError(
            f"histogram: expected levels and correct of one length, got {list(levels.shape)} and {list(correct.shape)}"
        )
    bins = np.searchsorted(np.asarray(edges, np.float64), levels, side="right") - 1
    if (bins < 0).any():
        raise ShapeError(f"histogram: expected levels >= {edges[0]}, got {levels.min()}")
    count = len(edges)
    right = np.bincount(bins[correct.astype(bool)], minlength=count)
    return Histogram(tuple(edges), right, np.bincount(bins, minlength=count))


@dataclass(frozen=True)
class Calibrated:
    """A threshold and what is known about it.

    Attributes:
        theta: Least agreement to answer from; infinite if no threshold is safe.
        risk: What was asked for, ε.
        bound: Upper confidence bound of the risk at θ; NaN if no threshold is safe.
        accepted: Held-out queries that it accepts.
        errors: Of those, answered wrongly.
        total: Held-out queries.
    """

    theta: float
    risk: float
    bound: float
    accepted: int
    errors: int
    total: int


def clopper_pearson_upper(errors: int, trials: int, confidence: float) -> float:
    """One-sided upper confidence bound of a probability.

    Args:
        errors: Times that it happened.
        trials: Times that it could have happened.
        confidence: Probability with which the bound holds, in (0, 1).

    Returns:
        In [0, 1]; 1 without a trial or when it always happened.

    Raises:
        ConfigError: The counts or the confidence are impossible.

    Source:
        Clopper and Pearson 1934, by the quantile of a beta distribution.
    """
    if not 0 <= errors <= trials or not 0 < confidence < 1:
        raise ConfigError(
            f"confidence bound: expected 0 <= errors <= trials and confidence in (0, 1), "
            f"got {errors}, {trials} and {confidence}"
        )
    if errors == trials:
        return 1.0
    return float(betaincinv(errors + 1, trials - errors, confidence))


def solve(
    counts: Histogram, risk: float, confidence: float = 0.95, among: Among = "accepted"
) -> Calibrated:
    """The smallest threshold whose risk is at most ε with the given confidence.

    Thresholds are tested one after the other from the strictest down and the first that fails ends it, so no
    correction for testing many of them is due. A threshold with so few queries that it could not pass without an error
    is passed over; that keeps the guarantee as long as more agreement does not mean more errors. An empty bin is
    passed over too: θ does not go down to levels that were never seen.

    Args:
        counts: Of held-out queries, not of those that the cascade is judged on.
        risk: ε, in (0, 1).
        confidence: That the risk at the result is at most ε, in (0, 1).
        among: ``accepted``: ε bounds the share of wrong answers among those that the tier gives. ``all``: among all
            queries, P(accepted and wrong), as in the source; that one is smaller.

    Returns:
        Its θ is one of the edges, or infinite.

    Raises:
        ConfigError: The risk or the confidence is not in (0, 1).

    Source:
        Fixed-sequence testing: Angelopoulos et al. 2021, Learn then test, section 4.1. The risk: Kolawole et al. 2025,
        ε-safe deferral, which subtracts the large model's own errors on the accepted queries; they are not subtracted
        here, so that a safe tier is safe beside any large model.
    """
    if not 0 < risk < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"calibration: expected risk and confidence in (0, 1), got {risk} and {confidence}"
        )
    total = int(counts.total.sum())
    safe = Calibrated(ALWAYS_DEFER, risk, math.nan, 0, 0, total)
    accepted = np.cumsum(counts.total[::-1])[::-1]
    errors = np.cumsum((counts.total - counts.correct)[::-1])[::-1]
    for place in reversed(range(len(counts.edges))):
        trials = int(accepted[place]) if among == "accepted" else total
        if not counts.total[place] or clopper_pearson_upper(0, trials, confidence) > risk:
            continue
        bound = clopper_pearson_upper(int(errors[place]), trials, confidence)
        if bound > risk:
            break
        safe = Calibrated(
            counts.edges[place], risk, bound, int(accepted[place]), int(errors[place]), total
        )
    return safe
