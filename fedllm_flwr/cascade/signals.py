"""Whether agreement tells right answers from wrong ones: ranking, selective risk, gain over random deferral, clones.

Members that are copies of each other agree on everything, right or wrong: their agreement says nothing, and the AUROC
is 0.5. What helps is that members err apart, so the correlation of their errors is measured too.

Axes: Q queries, k members.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from fedllm_flwr.cascade.curves import resampled
from fedllm_flwr.cascade.quality import mean_by_level, quality_gain
from fedllm_flwr.errors import ShapeError


@dataclass(frozen=True)
class Auroc:
    """How well levels rank right answers above wrong ones.

    Attributes:
        value: Probability that a right answer has the higher level than a wrong one, ties count half; NaN if all
            answers are right, or all wrong.
        low: Lower end of its bootstrap interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def auroc(levels: np.ndarray, correct: np.ndarray) -> float:
    """Area under the ROC curve of levels as a test for right answers.

    Args:
        levels: Agreement. [Q]
        correct: Whether the answer is right. [Q]

    Returns:
        See :attr:`Auroc.value`.

    Raises:
        ShapeError: The shapes differ.

    Source:
        Mann and Whitney 1947, by mid-ranks.
    """
    right = _checked(levels, correct)
    positives = int(right.sum())
    negatives = right.size - positives
    if not positives or not negatives:
        return math.nan
    ranks = float(rankdata(levels)[right].sum())
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


def deferral_auroc(
    levels: np.ndarray,
    correct: np.ndarray,
    generator: np.random.Generator,
    confidence: float = 0.95,
    replicates: int = 1000,
) -> Auroc:
    """The AUROC with a percentile bootstrap interval over queries.

    Args:
        levels: Agreement. [Q]
        correct: Whether the answer is right. [Q]
        generator: Draws the queries.
        confidence: Two-sided coverage, in (0, 1).
        replicates: Times that Q queries are drawn; draws with right or wrong answers only do not count.

    Raises:
        ShapeError: The shapes differ.
    """
    value = auroc(levels, correct)
    if math.isnan(value):
        return Auroc(value, math.nan, math.nan)
    order = np.argsort(levels, kind="stable")
    starts = np.flatnonzero(np.diff(levels[order], prepend=-np.inf))
    right = correct.astype(bool)[order]
    values: list[np.ndarray] = []
    for counts in resampled(right.size, generator, replicates):
        drawn = counts[:, order]
        positive = np.add.reduceat(drawn * right, starts, axis=1)
        negative = np.add.reduceat(drawn * ~right, starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        won = (positive * (below + negative / 2)).sum(axis=1)
        values.append(won[pairs > 0] / pairs[pairs > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return Auroc(value, float(low), float(high))


def aurc(levels: np.ndarray, correct: np.ndarray) -> float:
    """Area under the risk-coverage curve: mean error among the n most agreed answers, over n = 1 to Q.

    Args:
        levels: Agreement. [Q]
        correct: Whether the answer is right. [Q]

    Returns:
        In [0, 1], smaller is better; the error rate for levels that say nothing. Answers of the same level stand in
        random order, in expectation.

    Raises:
        ShapeError: The shapes differ.

    Source:
        Geifman, Uziel and El-Yaniv 2019, Bias-reduced uncertainty estimation, section 2.
    """
    wrong = ~_checked(levels, correct)
    errors = np.cumsum(mean_by_level(-levels, wrong.astype(np.float64)))
    return float(np.mean(errors / np.arange(1, wrong.size + 1)))


def deferral_gain(levels: np.ndarray, first: np.ndarray, last: np.ndarray) -> float:
    """How much of the way from random to perfect deferral the levels go, over all deferral rates.

    Args:
        levels: Agreement of the first tier; the lowest are deferred first. [Q]
        first: Whether the first tier is right. [Q]
        last: Whether the tier that answers deferred queries is right. [Q]

    Returns:
        (A − A_random) / (A_perfect − A_random) with A the area under accuracy over the deferral rate. 1 for perfect
        deferral, which sends those first that only the last tier answers rightly and those last that only the first
        does; 0 for random; NaN where no order is better than another.

    Raises:
        ShapeError: The shapes differ.
    """
    return quality_gain(levels, _checked(levels, first), _checked(levels, last))


def error_correlation(correct: np.ndarray) -> np.ndarray:
    """Correlation of the members' errors, pair by pair.

    Args:
        correct: Whether each member is right. [Q, k]

    Returns:
        Phi coefficients [k, k]: 1 on the diagonal and for clones; NaN for a member that is always right or always
        wrong.

    Raises:
        ShapeError: It is not [Q, k] with queries.
    """
    if correct.ndim != 2 or not correct.size:
        raise ShapeError(f"errors: expected [queries, members], got {list(correct.shape)}")
    centred = correct - correct.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    scaled = centred / np.where(spread > 0, spread, np.nan)
    found: np.ndarray = scaled.T @ scaled
    return found


def mean_error_correlation(correct: np.ndarray) -> float:
    """Mean of :func:`error_correlation` over the pairs that have one; NaN when none has.

    Args:
        correct: Whether each member is right. [Q, k]
    """
    table = error_correlation(correct)
    pairs = table[np.triu_indices(len(table), 1)]
    known = pairs[~np.isnan(pairs)]
    return float(known.mean()) if known.size else math.nan


def _checked(levels: np.ndarray, correct: np.ndarray) -> np.ndarray:
    if levels.shape != correct.shape or levels.ndim != 1 or not levels.size:
        raise ShapeError(
            f"signal: expected levels and answers of one length > 0, got {list(levels.shape)} and {list(correct.shape)}"
        )
    right: np.ndarray = correct.astype(bool)
    return right
