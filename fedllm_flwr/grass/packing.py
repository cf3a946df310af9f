"""Rows of several matrices as one flat array, and which rows they are as short text.

Matrices are in the order of their names. Axes: m rows and n columns of a matrix, k chosen rows.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.grass.rows import RowUpdate


def pack(updates: Mapping[str, RowUpdate]) -> np.ndarray:
    """The values of all updates, float32 [sum of k n]."""
    pieces = [updates[name].values.ravel() for name in sorted(updates)]
    return np.concatenate(pieces or [np.zeros(0, np.float32)]).astype(np.float32, copy=False)


def unpack(
    flat: np.ndarray, indices: Mapping[str, np.ndarray], columns: Mapping[str, int]
) -> dict[str, RowUpdate]:
    """Undo :func:`pack`; values are views where they are float32 already.

    Args:
        flat: The values.
        indices: By name of the matrix the rows that are in it, rising, int64 [k].
        columns: n of each of these matrices.

    Raises:
        ShapeError: There are more or fewer values.
    """
    expected = sum(len(rows) * columns[name] for name, rows in indices.items())
    if flat.shape != (expected,):
        raise ShapeError(f"rows: expected {expected} values, got {flat.size}")
    found, offset = {}, 0
    for name in sorted(indices):
        size = len(indices[name]) * columns[name]
        values = flat[offset : offset + size].reshape(-1, columns[name])
        found[name] = RowUpdate(indices[name], values.astype(np.float32, copy=False))
        offset += size
    return found


def bitmap(indices: np.ndarray, rows: int) -> str:
    """Which of m rows are chosen, one bit each, as base64: 4 characters for 24 rows."""
    mask = np.zeros(rows, dtype=bool)
    mask[indices] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def indices_of(text: Any, rows: int, who: str) -> np.ndarray:
    """Undo :func:`bitmap`; what comes out is rising, without repetition and in range, whatever was sent.

    Args:
        text: The bitmap.
        rows: m.
        who: Whose, for the message.

    Returns:
        int64 [k].

    Raises:
        WireError: It is no bitmap of m rows.
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, TypeError, ValueError):
        raise WireError(f"{who}: expected a bitmap of {rows} rows, got {text!r:.40}") from None
    bits = np.unpackbits(packed)
    if len(packed) != -(-rows // 8) or bits[rows:].any():
        raise WireError(f"{who}: expected a bitmap of {rows} rows, got {len(bits)} bits")
    return np.flatnonzero(bits)


def scales_text(scales: np.ndarray) -> str:
    """Scales of chosen rows, float32 [k], as base64: all of their bits are kept."""
    return base64.b64encode(scales.astype("<f4").tobytes()).decode("ascii")


def scales_of(text: str) -> np.ndarray:
    """Undo :func:`scales_text`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
