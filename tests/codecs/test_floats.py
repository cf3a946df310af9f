import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm_flwr.codecs import FLOAT_CODECS
from fedllm_flwr.errors import WireError

FLOATS = arrays.arrays(
    np.float32, st.integers(0, 40), elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=False)
)


def there_and_back(values: np.ndarray, codec: str) -> np.ndarray:
    known = FLOAT_CODECS[codec]
    stored = known.encode(values, (values.shape,))
    assert stored.nbytes == known.size_bytes((values.shape,))
    return known.decode(stored, (values.shape,))


@given(FLOATS)
def test_bfloat16_rounds_as_torch_does(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(there_and_back(values, "bfloat16"), expected)


@pytest.mark.parametrize("codec", FLOAT_CODECS)
def test_nan_and_infinity_are_carried_for_the_receiver_to_name(codec: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0], dtype=np.float32)
    np.testing.assert_array_equal(there_and_back(values, codec), values)


@given(FLOATS)
def test_float32_is_exact_and_float16_rounds_as_numpy_does(values: np.ndarray) -> None:
    np.testing.assert_array_equal(there_and_back(values, "float32"), values)
    half = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(there_and_back(values, "float16"), half)


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(WireError, match="65504, got 70000"):
        FLOAT_CODECS["float16"].encode(np.array([7e4], np.float32), ((1,),))


@pytest.mark.parametrize("codec", FLOAT_CODECS)
def test_an_array_of_another_dtype_or_size_is_refused(codec: str) -> None:
    known = FLOAT_CODECS[codec]
    with pytest.raises(WireError, match=rf"codec {codec}: expected a flat .* array, got int64"):
        known.decode(np.zeros(4, np.int64), ((4,),))
    short = known.encode(np.ones(3, np.float32), ((3,),))
    with pytest.raises(WireError, match=rf"codec {codec}: expected {4 * known.width} bytes, got"):
        known.decode(short, ((4,),))
