"""Is a cascade as good as the large model, up to a margin that was stated beforehand?

"No significant difference" is no answer: few queries never show one. The bound here says how much accuracy may be lost.

Axes: Q queries.
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from fedllm_flwr.errors import ConfigError, ShapeError


def most_lost(candidate: np.ndarray, reference: np.ndarray, confidence: float = 0.95) -> float:
    """One-sided upper confidence bound of the accuracy that a candidate loses against a reference on the same queries.

    Args:
        candidate: Whether it answers each query rightly. [Q]
        reference: The same of what it is held against. [Q]
        confidence: With which the loss is at most that, in (0, 1).

    Returns:
        The candidate is not inferior by a margin δ if this is below δ. Negative where it is surely better.

    Raises:
        ShapeError: The shapes differ, or there is no query.
        ConfigError: The confidence is out of range.

    Source:
        Tango 1998, Equivalence test and confidence interval for the difference in proportions for the paired-sample
        design: the score interval. Wald's interval, also with half observations added, covers too rarely here.
    """
    if candidate.shape != reference.shape or candidate.ndim != 1 or not candidate.size:
        raise ShapeError(
            f"non-inferiority: expected answers to the same queries, got {list(candidate.shape)} and "
            f"{list(reference.shape)}"
        )
    if not 0 < confidence < 1:
        raise ConfigError(f"non-inferiority: expected confidence in (0, 1), got {confidence:g}")
    one, other = candidate.astype(bool), reference.astype(bool)
    queries, z = one.size, float(norm.ppf(confidence))
    lost, won = int((other & ~one).sum()), int((one & ~other).sum())

    def room(loss: float) -> float:
        """Above 0 while so much loss is not ruled out."""
        linear = (2 * queries - lost + won) * loss - lost - won
        constant = -won * loss * (1 - loss)
        root = math.sqrt(max(0.0, linear**2 - 8 * queries * constant))
        variance = queries * (2 * (root - linear) / (4 * queries) + loss * (1 - loss))
        return lost - won - queries * loss + z * math.sqrt(max(0.0, variance))

    least = (lost - won) / queries + 1e-12
    if least >= 1 or room(1.0) >= 0:
        return 1.0
    return float(brentq(room, least, 1.0)) if room(least) > 0 else least
