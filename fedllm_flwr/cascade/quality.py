"""How good a free text is, and what a signal is worth that decides whose text is taken.

Axes: Q queries.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ShapeError

ORDER, BETA = 6, 2.0
REPLICATES = 500


def chr_f(text: str | None, reference: str) -> float:
    """A text's chrF: F2 of the character n-grams that it shares with a reference, in [0, 1].

    Args:
        text: The answer; None is worth 0.
        reference: What was to be written.

    Returns:
        Precision and recall are means over n = 1 to 6, of those n for which both texts have n-grams; white space is
        left out.

    Source:
        Popović 2015, chrF: character n-gram F-score for automatic MT evaluation, β = 2.
    """
    one, other = ("".join((own or "").split()) for own in (text, reference))
    precisions, recalls = [], []
    for n in range(1, min(ORDER, len(one), len(other)) + 1):
        mine, theirs = (Counter(t[k : k + n] for k in range(len(t) - n + 1)) for t in (one, other))
        same = (mine & theirs).total()
        precisions.append(same / mine.total())
        recalls.append(same / theirs.total())
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = float(np.mean(precisions)), float(np.mean(recalls))
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


@dataclass(frozen=True)
class Gain:
    """What a signal is worth, with its bootstrap interval.

    Attributes:
        value: See :func:`quality_gain`.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def quality_gain(levels: np.ndarray, first: np.ndarray, last: np.ndarray) -> float:
    """How much of the way from random to perfect deferral a signal goes, over all deferral rates.

    Args:
        levels: Signal of the first tier; the lowest are deferred first, equal ones in random order, in expectation. [Q]
        first: Quality of the first tier's answers. [Q]
        last: Quality of the answers of the tier that deferred queries go to. [Q]

    Returns:
        (A − A_random) / (A_perfect − A_random) with A the area under mean quality over the deferral rate. Perfect
        deferral sends those first that gain most by it. 1 for perfect deferral, 0 for random, negative for worse; NaN
        where no order is better than another.

    Raises:
        ShapeError: The shapes differ.
    """
    if not levels.shape == first.shape == last.shape or levels.ndim != 1 or not levels.size:
        raise ShapeError(
            f"gain: expected levels and qualities of one length > 0, got {list(levels.shape)}, {list(first.shape)} and "
            f"{list(last.shape)}"
        )
    gain = last.astype(np.float64) - first.astype(np.float64)
    random = gain.mean() * np.arange(gain.size + 1)
    perfect = np.cumsum([0.0, *np.sort(gain)[::-1]])
    found = np.cumsum([0.0, *mean_by_level(levels, gain)])
    room = float(np.trapezoid(perfect - random))
    return float(np.trapezoid(found - random)) / room if room > 1e-9 else math.nan


def bootstrapped_gain(
    levels: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    generator: np.random.Generator,
    confidence: float = 0.95,
) -> Gain:
    """The gain with a percentile bootstrap interval over queries; draws without a gain do not count.

    Args:
        levels: As in :func:`quality_gain`, as are ``first`` and ``last``.
        first: See there.
        last: See there.
        generator: Draws the queries.
        confidence: Two-sided coverage, in (0, 1).
    """
    value = quality_gain(levels, first, last)
    draws = generator.integers(0, levels.size, (REPLICATES, levels.size))
    values = np.array([quality_gain(levels[own], first[own], last[own]) for own in draws])
    known = values[~np.isnan(values)]
    if math.isnan(value) or not known.size:
        return Gain(value, math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Gain(value, float(low), float(high))


def mean_by_level(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values in ascending order of levels; each is the mean of those of its level, [Q]."""
    _, place, counts = np.unique(levels, return_inverse=True, return_counts=True)
    means = np.bincount(place, weights=values) / counts
    found: np.ndarray = np.repeat(means, counts)
    return found
