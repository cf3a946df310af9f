import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm_flwr.codecs import TopKCodec
from fedllm_flwr.errors import WireError

FLOATS = arrays.arrays(
    np.float32,
    st.integers(0, 70),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@given(FLOATS, st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0]))
def test_the_largest_are_sent_exactly_and_the_others_are_zero(
    values: np.ndarray, fraction: float
) -> None:
    codec, shapes = TopKCodec(fraction), (values.shape,)
    stored = codec.encode(values, shapes)
    assert stored.nbytes == codec.size_bytes(shapes)
    found = codec.decode(stored, shapes)
    kept = math.ceil(fraction * values.size)
    chosen = sorted(range(values.size), key=lambda i: (-abs(values[i]), i))[:kept]
    expected = np.zeros_like(values)
    expected[chosen] = values[chosen]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [
        (0, 0.1, 0),
        (1, 0.1, 4 + 1),  # a bitmap of one bit
        (1000, 0.1, 400 + 125),  # a bitmap, since 100 places of four bytes are more
        (1000, 0.01, 40 + 40),  # ten places, since a bitmap has 125 bytes
        (320, 1 / 32, 40 + 40),
        (1000, 1.0, 4000 + 125),
    ],
)
def test_bytes_are_counted_by_hand(values: int, fraction: float, expected: int) -> None:
    assert TopKCodec(fraction).size_bytes(((values,),)) == expected


def test_a_bitmap_and_places_say_the_same() -> None:
    values = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    for fraction in (0.02, 0.04):  # below and above 1/32
        codec = TopKCodec(fraction)
        found = codec.decode(codec.encode(values, ((640,),)), ((640,),))
        assert np.count_nonzero(found) == codec.kept(640)
        assert np.abs(values[found == 0]).max() < np.abs(found[found != 0]).min()


def spoiled(fraction: float, start: int, change: np.ndarray) -> np.ndarray:
    stored = TopKCodec(fraction).encode(np.arange(64, dtype=np.float32), ((64,),))
    stored[start : start + change.size] = change
    return stored


@pytest.mark.parametrize(
    ("fraction", "start", "change"),
    [
        (1 / 32, 8, np.frombuffer(np.array([5, 64], "<i4").tobytes(), np.uint8)),
        (1 / 32, 8, np.frombuffer(np.array([-1, 5], "<i4").tobytes(), np.uint8)),
        (1 / 32, 8, np.frombuffer(np.array([5, 5], "<i4").tobytes(), np.uint8)),
        (1.0, 256, np.zeros(1, np.uint8)),
    ],
    ids=["beyond", "negative", "twice", "too few bits"],
)
def test_places_that_cannot_be_are_refused(fraction: float, start: int, change: np.ndarray) -> None:
    with pytest.raises(WireError, match=r"codec top_k: expected \d+ rising places below 64"):
        TopKCodec(fraction).decode(spoiled(fraction, start, change), ((64,),))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(WireError, match="codec top_k: expected finite values, got nan at 2"):
        TopKCodec(0.1).encode(np.array([1, 2, np.nan], np.float32), ((3,),))


def test_another_size_is_refused() -> None:
    stored = TopKCodec(0.5).encode(np.ones(8, np.float32), ((8,),))
    with pytest.raises(WireError, match=r"expected 26 bytes for 12 values, got uint8 \[17\]"):
        TopKCodec(0.5).decode(stored, ((12,),))
