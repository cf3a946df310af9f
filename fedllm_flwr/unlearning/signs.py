"""Sign-fixed tuning: clients whose updates cannot cancel each other, and the masks that tell them apart again.

One random vector of signs is drawn before training. Each client trains alone from the same start, and after each
optimizer step keeps only the coordinates that have moved the way of their sign. What it sends is added to the others';
its mask of coordinates that moved is its own, and depends on nobody else's data. That is why one client can be taken
out without a word to the others.

For LoRA the coordinates are those of B, with A frozen and shared: ΔW is linear in B, so sums of B are sums of updates.
Signs on A and B both would not fix the signs of B A.

Axes: d coordinates, k coordinates that moved. τ = θ - θ₀ is a client's task vector.

Source:
    Kuo, Setlur, Srinivas, Raghunathan, Smith 2025, Exact unlearning of finetuning data via model merging at scale
    (arXiv 2504.04626), SIFT-Masks. Its Algorithm 1 writes the signs as 1{rand > .5}, which is 0 or 1, and projects
    before the step; its text and figures mean ±1 and after the step. We do what the text says: projected before the
    step, the last step would be free to leave the orthant, and sums of clients could cancel after all.
"""

import hashlib

import numpy as np
from torch import Tensor, no_grad

from fedllm_flwr.errors import ConfigError, ShapeError

SEED_BYTES = 8
"""What a client needs to know of the signs."""


def sign_vector(seed: int, size: int) -> np.ndarray:
    """The signs v that every client shares.

    Args:
        seed: Of the run, in [0, 2**64): the eight bytes that are sent in place of the signs.
        size: Coordinates (d), > 0.

    Returns:
        int8 [d] of -1 and 1, the bits of SHAKE-256 of the seed. They are the same for every version of every library,
        which NumPy does not promise of its generators, and a longer vector begins with a shorter one.

    Raises:
        ConfigError: The seed or the size is out of range.
    """
    if not 0 <= seed < 2 ** (8 * SEED_BYTES) or size < 1:
        raise ConfigError(
            f"signs: expected a seed in [0, 2**64) and a size > 0, got {seed} and {size}"
        )
    digest = hashlib.shake_256(seed.to_bytes(SEED_BYTES, "little")).digest((size + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=size)
    signs: np.ndarray = bits.astype(np.int8) * np.int8(2) - np.int8(1)
    return signs


@no_grad()
def project_(values: Tensor, start: Tensor, signs: Tensor) -> None:
    """Put parameters that moved against their sign back to where they started, in place; for after each step.

    What stays is bit-equal to what the optimizer made of it. The optimizer's own state is left as it is.

    Args:
        values: θ, changed in place. Any shape.
        start: θ₀, of the same shape.
        signs: v, of the same shape and any dtype.

    Raises:
        ShapeError: The shapes differ.
    """
    if not values.shape == start.shape == signs.shape:
        shapes = f"{list(values.shape)}, {list(start.shape)} and {list(signs.shape)}"
        raise ShapeError(f"project: expected values, start and signs of one shape, got {shapes}")
    # written so that a value that is not a number stays one, and is found by whoever checks the result
    values.copy_(start.where((values - start) * signs <= 0, values))


def mask_of(tau: np.ndarray) -> np.ndarray:
    """The coordinates that a client moved, as booleans [d]: its mask m, which it keeps."""
    return tau != 0


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """One bit a coordinate: uint8 [ceil(d / 8)], the first coordinate in the highest bit, padded with zeros."""
    return np.packbits(np.asarray(mask, dtype=bool))


def unpack_mask(packed: np.ndarray, size: int) -> np.ndarray:
    """The booleans [d] of :func:`pack_mask`.

    Raises:
        ShapeError: There are not as many bytes as a mask of that size has, or bits behind its end are set.
    """
    if packed.dtype != np.uint8 or packed.shape != ((size + 7) // 8,):
        raise ShapeError(
            f"mask: expected uint8 [{(size + 7) // 8}] for {size} coordinates, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    bits = np.unpackbits(packed)
    if bits[size:].any():
        raise ShapeError(f"mask: expected {size} coordinates, got bits behind them")
    return bits[:size].astype(bool)


def served(
    start: np.ndarray, total: np.ndarray, count: int, mask: np.ndarray | None = None
) -> np.ndarray:
    """The parameters that a client is served: θ₀ + (m · Σ τ) / T.

    Args:
        start: θ₀. [d]
        total: Σ τ over the clients that are in. [d]
        count: T, how many these are; of none, everybody is served the start.
        mask: m of a client that is in, as booleans [d]. None for a client that is unknown or was removed: it has no
            mask any more and is served θ₀ + Σ τ / T.

    Returns:
        [d] in the dtype of the start; computed in float64 and rounded once.

    Raises:
        ShapeError: The arrays are not of one length.
        ConfigError: The count is negative, or 0 for a total that is not zero.
    """
    _check_pair("served", start, total)
    if count < 0 or (count == 0 and total.any()):
        raise ConfigError(f"served: expected the number of clients in the sum, got {count}")
    update = np.asarray(total, dtype=np.float64) / max(count, 1)
    if mask is not None:
        if mask.dtype != bool or mask.shape != start.shape:
            raise ShapeError(
                f"served: expected a mask of booleans {list(start.shape)}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        update = np.where(mask, update, 0.0)
    parameters: np.ndarray = (start + update).astype(start.dtype)
    return parameters


def _check_pair(who: str, first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(
            f"{who}: expected two flat arrays of one length, "
            f"got shapes {list(first.shape)} and {list(second.shape)}"
        )
    if not np.isfinite(first).all() or not np.isfinite(second).all():
        raise ShapeError(f"{who}: expected finite values, got others")
