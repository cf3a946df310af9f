import numpy as np
import pytest

from fedllm_flwr.averaging.checks import LARGEST_WEIGHT, check_values, check_weight
from fedllm_flwr.errors import WireError


@pytest.mark.parametrize(
    "weight", [0, -1, -0.5, float("nan"), float("inf"), float("-inf"), 2.0**54]
)
def test_a_weight_that_would_spoil_a_mean_is_refused(weight):
    with pytest.raises(
        WireError, match=r"client 7: weight: expected a number above 0 and up to 2\*\*53"
    ):
        check_weight(weight, "client 7")


@pytest.mark.parametrize("weight", [1, 0.25, np.float32(3), LARGEST_WEIGHT])
def test_a_good_weight_comes_back_as_a_python_float(weight):
    checked = check_weight(weight, "client 7")
    assert type(checked) is float
    assert checked == weight


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(dtype, bad):
    values = np.zeros((3, 5), dtype)
    values[1, 2] = values[2, 4] = bad
    with pytest.raises(WireError, match="client 1: expected finite values, got 2 of 15 not finite"):
        check_values(values, "client 1")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, np.complex64])
def test_a_dtype_that_is_not_floating_point_is_refused(dtype):
    expected = f"client 1: expected float16, float32 or float64, got {np.dtype(dtype)}"
    with pytest.raises(WireError, match=expected):
        check_values(np.zeros(4, dtype), "client 1")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_finite_values_whose_squares_overflow_pass(dtype):
    check_values(np.full((2, 8), np.finfo(dtype).max, dtype), "client 1")


def test_empty_and_strided_arrays_pass():
    check_values(np.zeros((0, 4), np.float32), "client 1")
    check_values(np.zeros((4, 6), np.float32)[:, ::2].T, "client 1")
