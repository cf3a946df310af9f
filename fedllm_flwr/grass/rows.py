"""A change of some rows of a matrix.

Axes: k changed rows, n values of a row.
"""

from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ShapeError


@dataclass(frozen=True, eq=False)
class RowUpdate:
    """What is added to some rows of a matrix; the others are as they were.

    Attributes:
        indices: Which rows, rising, int64 [k].
        values: What is added to them, float32 [k, n].

    Raises:
        ShapeError: The arrays do not fit each other, or an index is negative or not above the one before it.
    """

    indices: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.indices.ndim != 1 or self.values.ndim != 2 or len(self.indices) != len(self.values):
            found = f"{self.indices.shape} and {self.values.shape}"
            raise ShapeError(f"row update: expected an index for each row of values, got {found}")
        if (np.diff(self.indices, prepend=-1) < 1).any():
            raise ShapeError(f"row update: expected rising indices >= 0, got {self.indices}")

    def check(self, shape: tuple[int, int], who: str) -> None:
        """Refuse a matrix that does not have these rows.

        Args:
            shape: Of the matrix.
            who: Which matrix, for the message.

        Raises:
            ShapeError: A row is not in the matrix, or its rows have another length.
        """
        last = int(self.indices[-1]) if len(self.indices) else -1
        if last >= shape[0] or self.values.shape[1] != shape[1]:
            raise ShapeError(
                f"row update, {who}: expected rows of {shape}, got row {last} of {self.values.shape[1]} values"
            )

    def plus(self, other: "RowUpdate") -> "RowUpdate":
        """The sum of two updates of one matrix, over the rows of either.

        Raises:
            ShapeError: Their rows differ in length.
        """
        if self.values.shape[1] != other.values.shape[1]:
            lengths = self.values.shape[1], other.values.shape[1]
            raise ShapeError(f"row updates: expected rows of one length, got {lengths}")
        indices = np.union1d(self.indices, other.indices)
        values = np.zeros((len(indices), self.values.shape[1]), dtype=np.float32)
        for part in (self, other):
            values[np.searchsorted(indices, part.indices)] += part.values
        return RowUpdate(indices, values)
