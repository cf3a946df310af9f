"""Integers of 8 or 4 bits, with one float32 scale for each block of neighbouring values.

Axes: n values, b blocks.
"""

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


@dataclass(frozen=True)
class BlockwiseCodec:
    """Linear quantisation around 0: a block's largest magnitude is the largest integer, 127 or 7.

    The array holds the b scales and then the integers, those of 4 bits two in a byte, the first one low. No value is
    off by more than half a step, absmax / 254 or absmax / 14 of its block, and a block of zeros comes back exactly.

    Attributes:
        bits: 8 or 4.
        block_size: Values under one scale; the last block of a part may have fewer.

    Source:
        Dettmers et al. 2022 (8-bit optimizers via block-wise quantization, arXiv 2110.02861), section 2.1. Differs in
        that steps are linear and not of their dynamic tree type, and in the block size.
    """

    bits: int
    block_size: int

    @property
    def name(self) -> str:
        """``int8`` or ``int4``."""
        return f"int{self.bits}"

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, values: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Round to the nearest step.

        Raises:
            WireError: A value is not finite, or the number of values is not that of the shapes.
        """
        flat = checked_values(self.name, values, shapes)
        blocks = self._blocks(flat.size)
        padded = np.zeros((blocks, self.block_size), np.float32)
        padded.reshape(-1)[: flat.size] = flat
        scales = self._scales(np.abs(padded).max(axis=1, initial=0.0))
        steps = np.where(scales > 0, scales, np.float32(1))[:, None]
        codes = np.rint(padded / steps).clip(-self._largest, self._largest).astype(np.int8)
        return np.concatenate([as_bytes(scales, "<f4"), self._packed(codes.ravel()[: flat.size])])

    def decode(self, stored: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Integers times their block's scale.

        Raises:
            WireError: The array has another dtype or size.
        """
        size = count_values(shapes)
        cut = 4 * self._blocks(size)
        checked_bytes(self, stored, shapes)
        scales = from_bytes(stored[:cut], "<f4").astype(np.float32)
        codes = self._unpacked(stored[cut:], size).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the receiver names what is not finite
            return codes * np.repeat(scales, self.block_size)[:size]

    def size_bytes(self, shapes: Shapes) -> int:
        """4b for the scales, and n or ⌈n/2⌉ for the integers."""
        size = count_values(shapes)
        return 4 * self._blocks(size) + (size if self.bits == 8 else -(-size // 2))

    def _blocks(self, size: int) -> int:
        return -(-size // self.block_size)

    def _scales(self, largest: np.ndarray) -> np.ndarray:
        """One step of each block; never so large that the largest integer times it is beyond float32."""
        with np.errstate(over="ignore"):
            scales = largest / np.float32(self._largest)
            beyond = np.isinf(scales * np.float32(self._largest))
        smaller: np.ndarray = np.nextafter(scales, np.float32(0))
        return np.where(beyond, smaller, scales)

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        if self.bits == 8:
            return codes.view(np.uint8)
        shifted = (codes + 8).astype(np.uint8)
        if shifted.size % 2:
            shifted = np.append(shifted, np.uint8(8))
        packed: np.ndarray = shifted[::2] | (shifted[1::2] << 4)
        return packed

    def _unpacked(self, stored: np.ndarray, size: int) -> np.ndarray:
        if self.bits == 8:
            return stored.view(np.int8)
        codes = np.stack([stored & 0x0F, stored >> 4], axis=1).ravel()[:size]
        return codes.astype(np.int8) - np.int8(8)
