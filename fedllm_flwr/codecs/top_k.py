"""The values of largest magnitude, and where they are; all others come back as 0.

Axes: n values of a part, k of them are sent.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.codecs.base import (
    Shapes,
    as_bytes,
    checked_bytes,
    checked_values,
    count_values,
    from_bytes,
)
from fedllm_flwr.errors import WireError


@dataclass(frozen=True)
class TopKCodec:
    """k = ⌈fraction · n⌉ values as float32, then their places: int32 each, or one bit for every value if that is less.

    What is sent is exact, so what is left out is exactly the rest. Among equal magnitudes the first ones are sent.

    Attributes:
        fraction: Of the values of a part, in (0, 1].

    Source:
        Kuo et al. 2024 (FLASC, arXiv 2406.05233) for top-k of LoRA on the wire; Stich et al. 2018 (sparsified
        SGD with memory) for what the sender keeps. Differs in that a bitmap is used where it is smaller.
    """

    fraction: float

    @property
    def name(self) -> str:
        """``top_k``."""
        return "top_k"

    def kept(self, size: int) -> int:
        """Values k that are sent of n."""
        return math.ceil(self.fraction * size)

    def encode(self, values: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Keep the k largest magnitudes.

        Raises:
            WireError: A value is not finite, or the number of values is not that of the shapes.
        """
        flat = checked_values(self.name, values, shapes)
        kept = self.kept(flat.size)
        if not kept:
            return np.zeros(0, np.uint8)
        magnitudes = np.abs(flat)
        least = np.partition(magnitudes, flat.size - kept)[flat.size - kept]
        above = np.flatnonzero(magnitudes > least)
        ties = np.flatnonzero(magnitudes == least)[: kept - above.size]
        places = np.sort(np.concatenate([above, ties]))
        if self._as_bitmap(flat.size):
            chosen = np.zeros(flat.size, np.uint8)
            chosen[places] = 1
            where = np.packbits(chosen, bitorder="little")
        else:
            where = as_bytes(places, "<i4")
        return np.concatenate([as_bytes(flat[places], "<f4"), where])

    def decode(self, stored: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Put the values in their places.

        Raises:
            WireError: The array has another dtype or size, or its places are not k different ones among n.
        """
        checked_bytes(self, stored, shapes)
        size = count_values(shapes)
        kept = self.kept(size)
        where = stored[4 * kept :]
        if self._as_bitmap(size):
            places = np.flatnonzero(np.unpackbits(where, bitorder="little"))
        else:
            places = from_bytes(where, "<i4").astype(np.int64)
        rising = bool((np.diff(places) > 0).all())
        if places.size != kept or not rising or (kept and not 0 <= places[0] <= places[-1] < size):
            raise WireError(f"codec top_k: expected {kept} rising places below {size}, got others")
        values = np.zeros(size, np.float32)
        values[places] = from_bytes(stored[: 4 * kept], "<f4")
        return values

    def size_bytes(self, shapes: Shapes) -> int:
        """4k for the values, and 4k or ⌈n/8⌉ for their places, whichever is less."""
        size = count_values(shapes)
        kept = self.kept(size)
        return 4 * kept + min(4 * kept, -(-size // 8))

    def _as_bitmap(self, size: int) -> bool:
        return -(-size // 8) < 4 * self.kept(size)
