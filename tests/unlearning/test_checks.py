import numpy as np
import pytest

from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.unlearning.checks import check_update


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finite_floats_pass_whatever_their_size(dtype):
    check_update(np.array([0, -np.finfo(dtype).max], dtype), 2, "client 1")


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        (np.ones((2, 1), np.float32), ShapeError, r"client 1: expected shape \[2\], got \[2, 1\]"),
        (np.ones(2, np.int64), WireError, "client 1: expected float16, float32 or float64, got int64"),
        (np.array([np.nan, -np.inf]), WireError, "client 1: expected finite values, got 2 of 2 not"),
        (np.array([1, np.inf]), WireError, "client 1: expected finite values, got 1 of 2 not"),
    ],
)  # fmt: skip
def test_others_are_refused_and_named(update, error, message):
    with pytest.raises(error, match=message):
        check_update(update, 2, "client 1")
