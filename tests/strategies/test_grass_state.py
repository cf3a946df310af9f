from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import Rows
from strategies.grass_state import restored, saved_arrays, saved_counts
from strategies.observer import Checkpointed

SHAPES = {"a": (5, 3), "b": (4, 2)}
CHANGED = {
    "b": RowUpdate(np.array([0, 3]), np.array([[1.0, 2], [3, 4]], np.float32)),
    "a": RowUpdate(np.array([4]), np.array([[5.0, 6, 7]], np.float32)),
}
CHOSEN = {"a": Rows(np.array([1, 2]), np.array([0.5, 1 / 3], np.float32))}


def checkpoint(**state: Any) -> Checkpointed:
    return Checkpointed(7, saved_arrays(CHANGED, CHOSEN), saved_counts(CHANGED, CHOSEN) | state)


def test_both_come_back() -> None:
    changed, chosen = restored(checkpoint(), SHAPES)
    assert set(changed) == set(CHANGED)
    for name, update in CHANGED.items():
        np.testing.assert_array_equal(changed[name].indices, update.indices)
        np.testing.assert_array_equal(changed[name].values, update.values)
    np.testing.assert_array_equal(chosen["a"].indices, CHOSEN["a"].indices)
    np.testing.assert_array_equal(chosen["a"].scales, CHOSEN["a"].scales)


def test_nothing_comes_back_as_nothing() -> None:
    empty = Checkpointed(0, saved_arrays({}, {}), saved_counts({}, {}))
    assert {v.dtype.name for v in empty.arrays.values()} == {"int64", "float32"}
    assert restored(empty, SHAPES) == ({}, {})


@pytest.mark.parametrize(
    ("saved", "shapes", "reason"),
    [
        (checkpoint(), {"a": (5, 3)}, "round 7: expected rows of the run's layers, got layer b"),
        (checkpoint(), {"a": (4, 3), "b": (4, 2)}, "round 7, layer a"),
        (
            Checkpointed(7, saved_arrays({}, CHOSEN), saved_counts({}, CHOSEN)),
            {"a": (2, 3)},
            "round 7, layer a: expected rows below 2, got 2",
        ),
        (checkpoint(changed={"a": 1, "b": 1}), SHAPES, "round 7: expected 2 rows, got 3"),
        (checkpoint(), {"a": (5, 2), "b": (4, 2)}, "rows: expected 6 values, got 7"),
    ],
)
def test_rows_of_other_matrices_are_refused(
    saved: Checkpointed, shapes: dict[str, tuple[int, int]], reason: str
) -> None:
    with pytest.raises(ShapeError, match=reason):
        restored(saved, shapes)
