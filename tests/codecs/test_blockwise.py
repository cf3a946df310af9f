import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm_flwr.codecs import BlockwiseCodec
from fedllm_flwr.errors import WireError

FLOATS = arrays.arrays(
    np.float32,
    st.integers(0, 70),
    elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False),
)
BITS = pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])


def there_and_back(codec: BlockwiseCodec, values: np.ndarray) -> np.ndarray:
    shapes = (values.shape,)
    stored = codec.encode(values, shapes)
    assert stored.dtype == np.uint8
    assert stored.nbytes == codec.size_bytes(shapes)
    return codec.decode(stored, shapes)


@BITS
@given(values=FLOATS, block_size=st.sampled_from([1, 2, 5, 64, 256]))
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(
    bits: int, steps: int, values: np.ndarray, block_size: int
) -> None:
    found = there_and_back(BlockwiseCodec(bits, block_size), values).astype(np.float64)
    for start in range(0, values.size, block_size):
        block = values[start : start + block_size].astype(np.float64)
        largest = np.abs(block).max()
        bound = largest / (2 * steps) * (1 + 1e-5) + 1e-40  # steps are rounded to float32
        assert np.abs(found[start : start + block_size] - block).max() <= bound


@BITS
def test_multiples_of_the_step_are_exact(bits: int, steps: int) -> None:
    values = np.arange(-steps, steps + 1, dtype=np.float32) / 4
    np.testing.assert_array_equal(there_and_back(BlockwiseCodec(bits, 300), values), values)


@BITS
def test_a_block_knows_nothing_of_the_next(bits: int, steps: int) -> None:
    values = np.array([1e-6, -1e-6, 1e6, 5e5], np.float32)
    found = there_and_back(BlockwiseCodec(bits, 2), values)
    np.testing.assert_allclose(found[:3], values[:3], rtol=1e-6)


@BITS
@pytest.mark.parametrize("value", [0.0, 3.4028235e38, -3.4028235e38, 1.4e-45, -1e-38])
def test_the_ends_of_float32_stay_finite(bits: int, steps: int, value: float) -> None:
    values = np.full(3, value, np.float32)
    found = there_and_back(BlockwiseCodec(bits, 256), values)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-43)


def test_bytes_are_counted_by_hand() -> None:
    for values, wide, narrow in ((0, 0, 0), (1, 5, 5), (256, 260, 132), (257, 265, 137)):
        assert BlockwiseCodec(8, 256).size_bytes(((values,),)) == wide
        assert BlockwiseCodec(4, 256).size_bytes(((values,),)) == narrow


def test_four_bits_lie_two_in_a_byte_the_first_one_low() -> None:
    stored = BlockwiseCodec(4, 8).encode(np.array([7, -7, 1], np.float32), ((3,),))
    assert stored[:4].view("<f4") == 1.0
    assert stored[4:].tolist() == [15 + 16 * 1, 9 + 16 * 8]


@BITS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_never_rounded_away(
    bits: int, steps: int, bad: float
) -> None:
    values = np.array([1, bad, 2], np.float32)
    with pytest.raises(
        WireError, match=rf"codec int{bits}: expected finite values, got {bad} at 1"
    ):
        BlockwiseCodec(bits, 2).encode(values, ((3,),))


@BITS
def test_other_sizes_and_dtypes_are_refused(bits: int, steps: int) -> None:
    codec = BlockwiseCodec(bits, 2)
    with pytest.raises(WireError, match=rf"codec int{bits}: expected 4 values, got 3"):
        codec.encode(np.ones(3, np.float32), ((2, 2),))
    stored = codec.encode(np.ones(4, np.float32), ((2, 2),))
    with pytest.raises(WireError, match=rf"codec int{bits}: expected \d+ bytes for 5 values"):
        codec.decode(stored, ((5,),))
    with pytest.raises(WireError, match="got float32"):
        codec.decode(stored.astype(np.float32), ((4,),))


def test_scales_that_are_not_finite_come_through_for_the_receiver_to_name() -> None:
    codec = BlockwiseCodec(8, 2)
    stored = codec.encode(np.array([0, 1], np.float32), ((2,),))
    stored[:4] = np.frombuffer(np.array([np.inf], "<f4").tobytes(), np.uint8)
    assert not np.isfinite(codec.decode(stored, ((2,),))).any()
