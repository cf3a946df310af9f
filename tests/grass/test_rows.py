import numpy as np
import pytest

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.grass.rows import RowUpdate


def update(*indices: int, value: float = 1.0, width: int = 2) -> RowUpdate:
    return RowUpdate(np.array(indices), np.full((len(indices), width), value, np.float32))


def test_the_sum_of_two_updates_has_the_rows_of_either() -> None:
    total = update(0, 3).plus(update(3, 7, value=2.0))
    assert total.indices.tolist() == [0, 3, 7]
    assert total.values.tolist() == [[1, 1], [3, 3], [2, 2]]
    assert update().plus(update()).values.shape == (0, 2)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="index for each row"):
        RowUpdate(np.array([1, 2]), np.zeros((1, 3), np.float32))
    for indices in ([2, 1], [1, 1], [-1, 0]):
        with pytest.raises(ShapeError, match="rising indices >= 0"):
            update(*indices)
    with pytest.raises(ShapeError, match="one length"):
        update(1).plus(update(1, width=3))
    for shape in ((3, 2), (4, 5)):
        with pytest.raises(ShapeError, match=r"layer q: expected rows of .* got row 3 of 2 values"):
            update(0, 3).check(shape, "layer q")
    update(0, 3).check((4, 2), "layer q")
    update().check((0, 2), "layer q")
