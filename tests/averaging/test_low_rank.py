import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.averaging import (
    LoraFactors,
    LowRank,
    add_low_rank,
    as_low_rank,
    best_rank,
    compact,
    dense,
    negate,
    product_of,
)
from fedllm_flwr.errors import ShapeError


def update(out_features, in_features, rank, seed=0):
    rng = np.random.default_rng(seed)
    return LowRank(
        rng.standard_normal((out_features, rank)).astype(np.float32),
        rng.standard_normal((rank, in_features)).astype(np.float32),
    )


def truncated(matrix, rank):
    """The oracle: SVD of the dense matrix, cut at the rank."""
    u, singular, vt = np.linalg.svd(matrix.astype(float), full_matrices=False)
    return (u[:, :rank] * singular[:rank]) @ vt[:rank]


def test_the_product_of_factors_by_hand():
    factors = LoraFactors(np.array([[1, 2, 3]], np.float32), np.array([[1], [-1]], np.float32), 2.0)
    np.testing.assert_array_equal(dense(product_of(factors)), [[2, 4, 6], [-2, -4, -6]])


def test_half_precision_factors_become_float32():
    product = product_of(LoraFactors(np.ones((1, 2), np.float16), np.ones((3, 1), np.float16), 1.0))
    assert product.left.dtype == product.right.dtype == np.float32


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
@settings(deadline=None)
def test_sums_put_factors_side_by_side(ranks):
    terms = [update(5, 3, rank, seed) for seed, rank in enumerate(ranks)]
    total = add_low_rank(*terms)
    assert total.rank == sum(ranks)
    np.testing.assert_allclose(dense(total), sum(dense(term) for term in terms), rtol=0, atol=1e-5)


def test_an_update_and_its_negative_cancel():
    term = update(5, 3, 2)
    np.testing.assert_array_equal(dense(add_low_rank(term, negate(term))), np.zeros((5, 3)))


def test_sums_refuse_nothing_and_other_shapes():
    with pytest.raises(ValueError, match="at least one term"):
        add_low_rank()
    with pytest.raises(ShapeError, match=r"term 1: expected shape \(5, 3\), got \(3, 5\)"):
        add_low_rank(update(5, 3, 1), update(3, 5, 1))


def test_a_sum_of_nothing_but_rank_0_is_zero():
    assert not dense(update(4, 6, 0)).any()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_a_dense_update_is_held_bit_for_bit(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    held = as_low_rank(matrix)
    assert held.rank == min(shape)
    np.testing.assert_array_equal(held.left @ held.right, matrix)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_compact_bounds_the_rank_and_keeps_the_product(shape):
    wide = update(*shape, 9)
    made = compact(wide)
    assert made.rank == min(shape)
    np.testing.assert_array_equal(dense(made), dense(wide))
    narrow = update(*shape, min(shape))
    assert compact(narrow) is narrow


@pytest.mark.parametrize(
    ("out_features", "in_features", "stacked", "rank"),
    [
        (12, 20, 9, 4),
        (20, 12, 9, 4),
        (16, 16, 16, 8),
        (8, 8, 24, 8),
        (8, 30, 40, 3),
        (30, 8, 40, 8),
        (12, 20, 5, 5),
    ],
)
def test_best_rank_is_the_truncated_svd(out_features, in_features, stacked, rank, relative_error):
    exact = update(out_features, in_features, stacked)
    factors = best_rank(exact, rank, scaling=0.25)
    assert factors.lora_a.shape == (rank, in_features)
    assert factors.lora_b.shape == (out_features, rank)
    assert factors.lora_a.dtype == factors.lora_b.dtype == np.float32
    assert (
        relative_error(dense(product_of(factors)), truncated(exact.left @ exact.right, rank)) < 1e-5
    )


def test_best_rank_of_an_update_of_that_rank_is_exact(relative_error):
    exact = update(12, 20, 4)
    got = dense(product_of(best_rank(exact, 4, scaling=2.0)))
    assert relative_error(got, exact.left.astype(float) @ exact.right.astype(float)) < 1e-6


def test_both_sides_share_the_singular_values_evenly():
    factors = best_rank(update(12, 20, 9), 4, scaling=0.5)
    a_norms = np.linalg.norm(factors.lora_a, axis=1)
    b_norms = np.linalg.norm(factors.lora_b, axis=0)
    np.testing.assert_allclose(a_norms, b_norms, rtol=1e-6)
    assert (np.diff(a_norms) <= 0).all()


def test_signs_do_not_depend_on_how_the_update_is_written():
    one = update(12, 20, 6)
    mixing = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0].astype(np.float32)
    other = LowRank(one.left @ mixing, mixing.T @ one.right)
    first, second = best_rank(one, 3, 1.0), best_rank(other, 3, 1.0)
    np.testing.assert_allclose(
        first.lora_a, second.lora_a, atol=2e-5
    )  # two float32 roundings of `other`
    np.testing.assert_allclose(first.lora_b, second.lora_b, atol=2e-5)
    largest = first.lora_b[np.abs(first.lora_b).argmax(axis=0), np.arange(3)]
    assert (largest > 0).all()


@pytest.mark.parametrize("stacked", [0, 1, 3])
def test_ranks_beyond_the_true_one_are_zero(stacked):
    factors = best_rank(update(12, 20, stacked), 5, scaling=1.0)
    assert (np.linalg.norm(factors.lora_a, axis=1) > 0).tolist() == [k < stacked for k in range(5)]
    assert not factors.lora_b[:, stacked:].any()


def test_float32_noise_does_not_count_as_a_direction():
    one = update(12, 20, 2)
    # The same update three times over, with weights that float32 cannot hold.
    repeated = add_low_rank(
        *(LowRank((one.left * np.float32(w)), one.right) for w in (0.1, 0.3, 0.6))
    )
    factors = best_rank(repeated, 6, scaling=1.0)
    assert not factors.lora_a[2:].any()


def test_an_all_zero_update_gives_zero_factors():
    factors = best_rank(LowRank(np.zeros((4, 2), np.float32), np.ones((2, 3), np.float32)), 2, 1.0)
    assert not factors.lora_a.any()
    assert not factors.lora_b.any()


@pytest.mark.parametrize(("rank", "scaling"), [(0, 1.0), (-1, 1.0), (2, 0.0)])
def test_best_rank_refuses_bad_options(rank, scaling):
    with pytest.raises(ValueError, match=r"expected rank > 0 and scaling > 0"):
        best_rank(update(4, 3, 2), rank, scaling)
