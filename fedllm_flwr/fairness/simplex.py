"""Euclidean projections onto the sets that multipliers live in; float64.

Axes: G = groups.
"""

import numpy as np


def project_simplex(values: np.ndarray, mass: float = 1.0) -> np.ndarray:
    """The nearest point of {x >= 0, Σx = mass}.

    Args:
        values: Any finite numbers. [G]
        mass: What the entries of the result sum to, >= 0.

    Returns:
        float64 [G], in the order of the values.

    Raises:
        ValueError: There are no values, or the mass is negative.

    Source:
        Duchi et al. 2008, Efficient projections onto the l1-ball, Figure 1.
    """
    if not values.size or mass < 0:
        raise ValueError(f"projection: expected values and mass >= 0, got {values.size} and {mass}")
    wide = values.astype(np.float64)
    # Only differences matter; taking the largest off first keeps huge values from swallowing the mass.
    wide -= wide.max()
    falling = np.sort(wide)[::-1]
    excess = (np.cumsum(falling) - mass) / np.arange(1, wide.size + 1)
    kept = max(int(np.sum(falling > excess)), 1)
    result: np.ndarray = np.maximum(wide - excess[kept - 1], 0.0)
    return result


def project_capped(values: np.ndarray, cap: float) -> np.ndarray:
    """The nearest point of {x >= 0, Σx <= cap}.

    Args:
        values: Any finite numbers. [G]
        cap: Largest sum of the result, >= 0.

    Returns:
        float64 [G], in the order of the values.

    Raises:
        ValueError: There are no values, or the cap is negative.

    Source:
        Duchi et al. 2008, section 3: inside the ball clip at 0, outside project onto its simplex.
    """
    clipped: np.ndarray = np.maximum(values.astype(np.float64), 0.0)
    if clipped.size and cap >= 0 and clipped.sum() <= cap:
        return clipped
    return project_simplex(values, cap)
