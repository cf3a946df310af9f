"""Codecs that round every value by itself: float32, float16 and bfloat16.

They need no shapes and carry values that are not finite, which the receiver names. Axes: n values.
"""

from dataclasses import dataclass

import numpy as np

from fedllm_flwr.codecs.base import Shapes, count_values
from fedllm_flwr.errors import WireError


@dataclass(frozen=True)
class FloatCodec:
    """A dtype of numpy's, or bfloat16 as 2n tagged bytes, since neither numpy nor Flower knows it.

    Attributes:
        name: ``float32``, ``float16`` or ``bfloat16``.
    """

    name: str

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return 4 if self.name == "float32" else 2

    @property
    def dtype(self) -> np.dtype:
        """Of the array that travels."""
        return np.dtype(np.uint8 if self.name == "bfloat16" else self.name)

    def encode(self, values: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Round to nearest, ties to even.

        Raises:
            WireError: A finite value is beyond the codec's range (float16 holds magnitudes up to 65504).
        """
        if self.name == "bfloat16":
            bits = values.astype(np.float32, copy=False).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            kept = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
            return kept.view(np.uint8)
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype, copy=False)
        if self.name == "float16" and np.isinf(stored).any() and np.isfinite(values).all():
            largest = float(np.abs(values).max())
            raise WireError(
                f"codec float16: expected magnitudes <= 65504, got {largest:g}; use bfloat16 or float32"
            )
        return stored

    def decode(self, stored: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Back to float32.

        Raises:
            WireError: The array has another dtype, more dimensions, or another size.
        """
        if stored.ndim != 1 or stored.dtype != self.dtype:
            raise WireError(
                f"codec {self.name}: expected a flat {self.dtype} array, got {stored.dtype} {stored.shape}"
            )
        if stored.nbytes != self.size_bytes(shapes):
            raise WireError(
                f"codec {self.name}: expected {self.size_bytes(shapes)} bytes, got {stored.nbytes}"
            )
        if self.name == "bfloat16":
            return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)

    def size_bytes(self, shapes: Shapes) -> int:
        """4n or 2n."""
        return self.width * count_values(shapes)
