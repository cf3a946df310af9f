import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.averaging import (
    LoraFactors,
    LowRank,
    beside_shared,
    dense,
    product_of,
    rescale,
    resize,
)
from fedllm_flwr.errors import ShapeError


def factors(rank=2, in_features=5, out_features=4, scaling=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return LoraFactors(
        rng.standard_normal((rank, in_features)).astype(np.float32),
        rng.standard_normal((out_features, rank)).astype(np.float32),
        scaling,
    )


def test_factors_know_their_sizes():
    made = factors(rank=2, in_features=5, out_features=4)
    assert (made.rank, made.in_features, made.out_features) == (2, 5, 4)


@pytest.mark.parametrize(
    ("a", "b"),
    [((1, 5), (4, 8)), ((8, 5), (4, 1)), ((5,), (4, 1)), ((2, 5, 1), (4, 2)), ((5, 2), (4, 2))],
)
def test_factors_of_two_ranks_are_refused(a, b):
    with pytest.raises(ShapeError, match=r"expected lora_a \[r, i\] and lora_b \[o, r\], got"):
        LoraFactors(np.zeros(a, np.float32), np.zeros(b, np.float32), 1.0)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_that_is_not_positive_is_refused(scaling):
    with pytest.raises(ValueError, match="scaling: expected a finite number > 0"):
        factors(scaling=scaling)
    with pytest.raises(ValueError, match="scaling: expected a finite number > 0"):
        beside_shared(factors().lora_a, factors(), side="a", scaling=scaling)


def test_a_low_rank_update_knows_its_sizes_and_refuses_a_broken_pair():
    update = LowRank(np.zeros((4, 3)), np.zeros((3, 6)))
    assert (update.rank, update.shape) == (3, (4, 6))
    with pytest.raises(ShapeError, match=r"expected left \[o, R\] and right \[R, i\]"):
        LowRank(np.zeros((4, 1)), np.zeros((3, 6)))


@given(st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None)
def test_padding_keeps_the_product_and_undoes_by_cutting(rank, extra):
    small = factors(rank)
    large = resize(small, rank + extra)
    assert large.rank == rank + extra
    assert large.scaling == small.scaling
    np.testing.assert_array_equal(dense(product_of(large)), dense(product_of(small)))
    back = resize(large, rank)
    np.testing.assert_array_equal(back.lora_a, small.lora_a)
    np.testing.assert_array_equal(back.lora_b, small.lora_b)


def test_a_rank_1_client_is_padded_with_zeros_and_not_repeated():
    large = resize(factors(rank=1), 8)
    assert large.lora_a.shape == (8, 5)
    assert large.lora_b.shape == (4, 8)
    assert not large.lora_a[1:].any()
    assert not large.lora_b[:, 1:].any()


def test_cutting_keeps_the_first_ranks():
    large = factors(rank=3)
    small = resize(large, 2)
    np.testing.assert_array_equal(small.lora_a, large.lora_a[:2])
    np.testing.assert_array_equal(small.lora_b, large.lora_b[:, :2])


def test_resize_refuses_a_rank_that_is_not_positive():
    with pytest.raises(ValueError, match="rank: expected > 0, got 0"):
        resize(factors(), 0)


def test_rescaling_changes_b_and_keeps_the_product():
    given_factors = factors(scaling=4.0)
    changed = rescale(given_factors, 0.5)
    assert changed.scaling == 0.5
    np.testing.assert_array_equal(changed.lora_a, given_factors.lora_a)
    np.testing.assert_array_equal(changed.lora_b, given_factors.lora_b * 8)
    np.testing.assert_array_equal(dense(product_of(changed)), dense(product_of(given_factors)))
    assert rescale(given_factors, 4.0) is given_factors


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_trained_side_beside_the_shared_one_is_the_clients_own_update(side, rank):
    shared = factors(rank=3, scaling=2.0)
    start = resize(shared, rank)
    own = factors(rank=rank, scaling=5.0, seed=1)
    trained = own.lora_a if side == "a" else own.lora_b
    client = (
        LoraFactors(trained, start.lora_b, 5.0)
        if side == "a"
        else LoraFactors(start.lora_a, trained, 5.0)
    )
    filled = beside_shared(trained, shared, side=side, scaling=5.0)
    assert (filled.rank, filled.scaling) == (3, 2.0)
    kept = "lora_b" if side == "a" else "lora_a"
    np.testing.assert_array_equal(getattr(filled, kept), getattr(shared, kept))
    # One more float32 rounding of entries near 1, summed over 3 ranks.
    np.testing.assert_allclose(
        dense(product_of(filled)), dense(product_of(client)), rtol=1e-6, atol=5e-6
    )


@pytest.mark.parametrize(
    ("side", "shape"),
    [("a", (2, 6)), ("a", (4, 5)), ("a", (5,)), ("b", (3, 2)), ("b", (4, 4)), ("b", (1, 3))],
)
def test_a_trained_side_that_does_not_fit_is_refused(side, shape):
    with pytest.raises(ShapeError, match=f"lora_{side}: expected .* or a smaller rank, got"):
        beside_shared(np.zeros(shape, np.float32), factors(rank=3), side=side, scaling=1.0)
