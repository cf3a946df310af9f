import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm_flwr.codecs import LowRankCodec
from fedllm_flwr.errors import WireError

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.integers(0, 9)),
    ),
    max_size=4,
)


def there_and_back(codec: LowRankCodec, values: np.ndarray, shapes: list) -> np.ndarray:
    stored = codec.encode(values, shapes)
    assert stored.dtype == np.uint8
    assert stored.nbytes == codec.size_bytes(shapes)
    return codec.decode(stored, shapes)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(1, 4), st.data())
def test_each_matrix_comes_back_as_its_best_approximation(
    shapes: list, rank: int, data: st.DataObject
) -> None:
    codec = LowRankCodec(rank)
    size = sum(int(np.prod(shape)) for shape in shapes)
    values = data.draw(
        arrays.arrays(
            np.float32, size, elements=st.floats(-10, 10, width=32, allow_subnormal=False)
        )
    )
    found, start = there_and_back(codec, values, shapes), 0
    for shape in shapes:
        stop = start + int(np.prod(shape))
        part, own = values[start:stop].reshape(shape), found[start:stop].reshape(shape)
        start = stop
        if not codec.saves(shape):
            np.testing.assert_array_equal(own, part)
            continue
        lost = np.linalg.svd(part.astype(np.float64), compute_uv=False)[rank:]
        distance = np.linalg.norm(own.astype(np.float64) - part)
        assert distance == pytest.approx(np.linalg.norm(lost), abs=1e-4)  # Eckart and Young


def test_a_matrix_of_that_rank_is_kept() -> None:
    generator = np.random.default_rng(0)
    matrix = (generator.standard_normal((20, 3)) @ generator.standard_normal((3, 30))).astype(
        np.float32
    )
    found = there_and_back(LowRankCodec(3), matrix, [(20, 30)])
    np.testing.assert_allclose(found.reshape(20, 30), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([], 0),
        ([(8, 576)], 4 * 4 * (8 + 576)),
        ([(576, 8)], 4 * 4 * (8 + 576)),
        ([(4, 576)], 4 * 4 * 576),  # a rank of 4 would need more
        ([(1000,)], 4000),
        ([(10, 64), (5,)], 4 * 4 * (10 + 64) + 20),
    ],
)
def test_bytes_are_counted_by_hand(shapes: list, expected: int) -> None:
    assert LowRankCodec(4).size_bytes(shapes) == expected


def test_the_product_is_summed_rank_after_rank() -> None:
    """The same bits on every machine, whatever library multiplies matrices there."""
    values = np.random.default_rng(1).standard_normal(400).astype(np.float32)
    codec = LowRankCodec(2)
    stored = codec.encode(values, [(20, 20)])
    left = stored[:160].view("<f4").reshape(20, 2)
    right = stored[160:].view("<f4").reshape(2, 20)
    expected = np.outer(left[:, 0], right[0]) + np.outer(left[:, 1], right[1])
    np.testing.assert_array_equal(codec.decode(stored, [(20, 20)]), expected.ravel())


def test_what_is_not_finite_or_of_another_size_is_refused() -> None:
    codec = LowRankCodec(1)
    with pytest.raises(WireError, match="codec low_rank: expected finite values, got inf at 0"):
        codec.encode(np.array([np.inf, 1], np.float32), [(2,)])
    stored = codec.encode(np.ones(9, np.float32), [(3, 3)])
    with pytest.raises(WireError, match=r"expected 36 bytes for 9 values, got uint8 \[24\]"):
        codec.decode(stored, [(9,)])
