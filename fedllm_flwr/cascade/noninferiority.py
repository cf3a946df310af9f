"""Is a cascade as good as the large model, up to a margin that was stated beforehand?

"No significant difference" is no answer: few queries never show one. The bound here says how much accuracy may be lost.

Axes: Q queries.
"""

import math

import numpy as np
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
        Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions: Wald's interval
        of the paired difference after half an observation is added to each of the four cells.
    """
    if candidate.shape != reference.shape or candidate.ndim != 1 or not candidate.size:
        raise ShapeError(
            f"non-inferiority: expected answers to the same queries, got {list(candidate.shape)} and "
            f"{list(reference.shape)}"
        )
    if not 0 < confidence < 1:
        raise ConfigError(f"non-inferiority: expected confidence in (0, 1), got {confidence:g}")
    one, other = candidate.astype(bool), reference.astype(bool)
    queries = one.size + 2
    lost = int((other & ~one).sum()) + 0.5
    won = int((one & ~other).sum()) + 0.5
    difference = (lost - won) / queries
    spread = math.sqrt((lost + won) - (lost - won) ** 2 / queries) / queries
    return difference + float(norm.ppf(confidence)) * spread
