"""What every codec does, and the checks that they share.

A part is a flat array that holds matrices one after the other. Both sides know their shapes, so none is sent.

Axes: n values of a part, over all of its matrices.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedllm_flwr.errors import WireError

Shapes = Sequence[tuple[int, ...]]
"""Shapes of the matrices and vectors that lie one after the other in a part."""


class Codec(Protocol):
    """Turns the values of a part into an array that travels, and back; of as many bytes as it says before."""

    @property
    def name(self) -> str:
        """The codec's name in the closed table."""

    def encode(self, values: np.ndarray, shapes: Shapes) -> np.ndarray:
        """From float32 [n] to a flat array.

        Raises:
            WireError: The codec cannot hold the values.
        """

    def decode(self, stored: np.ndarray, shapes: Shapes) -> np.ndarray:
        """From a flat array to float32 [n].

        Raises:
            WireError: The array is not what the codec makes of these shapes.
        """

    def size_bytes(self, shapes: Shapes) -> int:
        """Bytes of the array that :meth:`encode` makes, whatever the values."""


def count_values(shapes: Shapes) -> int:
    """Values n of a part."""
    return sum(math.prod(shape) for shape in shapes)


def checked_values(name: str, values: np.ndarray, shapes: Shapes) -> np.ndarray:
    """The values of a part as float32 [n].

    Args:
        name: The codec, for the message.
        values: Of any shape.
        shapes: Of the part.

    Raises:
        WireError: There are more or fewer values, or one is not finite: its scale would spoil or hide others.
    """
    flat = np.ravel(values).astype(np.float32, copy=False)
    expected = count_values(shapes)
    if flat.size != expected:
        raise WireError(f"codec {name}: expected {expected} values, got {flat.size}")
    finite = np.isfinite(flat)
    if not finite.all():
        first = int(np.argmin(finite))
        raise WireError(f"codec {name}: expected finite values, got {flat[first]} at {first}")
    return flat


def checked_bytes(codec: Codec, stored: np.ndarray, shapes: Shapes) -> np.ndarray:
    """An array of bytes, if it is one of the size that the codec makes of these shapes.

    Raises:
        WireError: Its dtype, dimensions or size differ.
    """
    expected = codec.size_bytes(shapes)
    if stored.dtype != np.uint8 or stored.shape != (expected,):
        raise WireError(
            f"codec {codec.name}: expected {expected} bytes for {count_values(shapes)} values, got {stored.dtype} "
            f"{list(stored.shape)}"
        )
    return stored


def as_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """The little-endian bytes of an array, uint8 [n]."""
    return np.frombuffer(values.astype(dtype, copy=False).tobytes(), np.uint8)


def from_bytes(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Undo :func:`as_bytes`."""
    return np.frombuffer(stored.tobytes(), dtype)
