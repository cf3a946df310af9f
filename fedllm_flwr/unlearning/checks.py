"""The check that an update passes before it is counted or kept."""

import numpy as np

from fedllm_flwr.errors import ShapeError, WireError


def check_update(update: np.ndarray, size: int, who: str) -> None:
    """Refuse an update that would spoil a sum or a ledger.

    Args:
        update: What came. [d]
        size: Values that it has to have (d).
        who: Whose it is, for the message, for example ``"client 3"``.

    Raises:
        ShapeError: The shape is not [d].
        WireError: It is not float16, float32 or float64, or a value is not finite; counts the bad values.
    """
    if update.shape != (size,):
        raise ShapeError(f"{who}: expected shape [{size}], got {list(update.shape)}")
    if update.dtype not in (np.float16, np.float32, np.float64):
        raise WireError(f"{who}: expected float16, float32 or float64, got {update.dtype}")
    bad = size - int(np.isfinite(update).sum())
    if bad:
        raise WireError(f"{who}: expected finite values, got {bad} of {size} not finite")
