"""Checks that every mean makes before it lets a client's numbers in.

A mean must refuse a bad contribution *before* it changes its sums, so that a strategy can drop that client and go on.
"""

import math

import numpy as np

from fedllm_flwr.errors import WireError

# Sums are kept in float64. A weight up to 2**53 (the largest example count that float64 counts exactly) times the
# largest float32 cannot overflow it, whatever the cohort.
LARGEST_WEIGHT = 2.0**53


def check_weight(weight: float, who: str) -> float:
    """Refuse a weight that would spoil a mean.

    Args:
        weight: Unnormalised weight of one client, for example its number of examples.
        who: The client, for the message, for example ``"client 3"``.

    Returns:
        The weight as a Python float.

    Raises:
        WireError: The weight is not finite, not positive, or above 2**53; names the client.
    """
    if not (math.isfinite(weight) and 0 < weight <= LARGEST_WEIGHT):
        raise WireError(f"{who}: weight: expected a number above 0 and up to 2**53, got {weight}")
    return float(weight)


def check_values(values: np.ndarray, who: str) -> None:
    """Refuse arrays that are not floating point or hold a NaN or an infinity.

    Args:
        values: Array of any shape, float16, float32 or float64.
        who: What the array is, for the message, for example ``"client 3, layer 0.q_proj.lora_a"``.

    Raises:
        WireError: The dtype is another one, or a value is not finite; the message counts the bad values.
    """
    if values.dtype not in (np.float16, np.float32, np.float64):
        raise WireError(f"{who}: expected float16, float32 or float64, got {values.dtype}")
    if np.isfinite(values).all():
        return
    bad = values.size - int(np.isfinite(values).sum())
    raise WireError(f"{who}: expected finite values, got {bad} of {values.size} not finite")
