"""Each matrix of a part as two thin ones; what that would not make smaller travels as float32.

Axes: m rows and n columns of a matrix, r rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from fedllm_flwr.codecs.base import (
    Shapes,
    as_bytes,
    checked_bytes,
    checked_values,
    count_values,
    from_bytes,
)


@dataclass(frozen=True)
class LowRankCodec:
    """The best approximation of rank r of each matrix, r (m + n) values in place of m n; vectors go as they are.

    Products are summed in one order, rank after rank, so that sender and receiver get the same bits whatever library
    multiplies matrices on their machines.

    Attributes:
        rank: r.

    Source:
        Eckart and Young 1936 for "best"; Vogels et al. 2019 (PowerSGD, arXiv 1905.13727) for low-rank updates with
        error feedback. Differs in that the decomposition is exact and not one step of power iteration, since no sum
        over clients is needed inside it.
    """

    rank: int

    @property
    def name(self) -> str:
        """``low_rank``."""
        return "low_rank"

    def saves(self, shape: tuple[int, ...]) -> bool:
        """Whether factors of a matrix have fewer values than the matrix."""
        return len(shape) == 2 and self.rank * sum(shape) < math.prod(shape)

    def encode(self, values: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Cut each matrix to rank r.

        Raises:
            WireError: A value is not finite, or the number of values is not that of the shapes.
        """
        flat = checked_values(self.name, values, shapes)
        with threadpool_limits(1):  # one thread: the same bits in every process
            pieces = [
                piece
                for shape, part in self._matrices(flat, shapes)
                for piece in (self._factors(part.reshape(shape)) if self.saves(shape) else (part,))
            ]
        return as_bytes(np.concatenate([np.ravel(p) for p in pieces] or [flat]), "<f4")

    def decode(self, stored: np.ndarray, shapes: Shapes) -> np.ndarray:
        """Multiply the factors out.

        Raises:
            WireError: The array has another dtype or size.
        """
        held = from_bytes(checked_bytes(self, stored, shapes), "<f4").astype(np.float32)
        values = np.empty(count_values(shapes), np.float32)
        offset = 0
        for shape, part in self._matrices(values, shapes):
            size = self._size(shape)
            own, offset = held[offset : offset + size], offset + size
            part[:] = self._product(own, shape).ravel() if self.saves(shape) else own
        return values

    def size_bytes(self, shapes: Shapes) -> int:
        """4 r (m + n) for each matrix that this makes smaller, and 4 for each other value."""
        return 4 * sum(self._size(shape) for shape in shapes)

    def _size(self, shape: tuple[int, ...]) -> int:
        return self.rank * sum(shape) if self.saves(shape) else math.prod(shape)

    def _factors(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, singular, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        root = np.sqrt(singular[: self.rank])
        return (
            (left[:, : self.rank] * root).astype(np.float32),
            (root[:, None] * right[: self.rank]).astype(np.float32),
        )

    def _product(self, held: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        rows, columns = shape
        left = held[: self.rank * rows].reshape(rows, self.rank)
        right = held[self.rank * rows :].reshape(self.rank, columns)
        total = np.zeros((rows, columns), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the receiver names what is not finite
            for position in range(self.rank):
                total += left[:, position, None] * right[position]
        return total

    @staticmethod
    def _matrices(flat: np.ndarray, shapes: Shapes) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        start = 0
        for shape in shapes:
            stop = start + math.prod(shape)
            yield shape, flat[start:stop]
            start = stop
