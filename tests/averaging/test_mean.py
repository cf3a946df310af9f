import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm_flwr.averaging import RunningMean
from fedllm_flwr.averaging.mean import BLOCK
from fedllm_flwr.errors import ShapeError, WireError

cohorts = st.integers(1, 6).flatmap(
    lambda size: st.lists(
        st.tuples(
            hnp.arrays(np.float32, size, elements=st.floats(-1e3, 1e3, width=32)),
            st.floats(1e-3, 1e4),
        ),
        min_size=1,
        max_size=8,
    )
)


def mean_of(contributions):
    mean = RunningMean(contributions[0][0].size)
    for values, weight in contributions:
        mean.add(values, weight)
    return mean.result()


def test_three_clients_by_hand():
    mean = RunningMean(2)
    mean.add(np.array([1, 0], np.float32), 1)
    mean.add(np.array([3, 4], np.float32), 2)
    mean.add(np.array([5, 8], np.float32), 5)
    assert mean.count == 3
    assert mean.total_weight == 8
    np.testing.assert_array_equal(mean.result(), np.array([4, 6], np.float32))
    assert mean.result().dtype == np.float32


def test_more_may_follow_a_result_and_the_result_is_its_own_array():
    mean = RunningMean(1)
    mean.add(np.array([2], np.float32), 1)
    first = mean.result()
    mean.add(np.array([4], np.float32), 1)
    assert first.tolist() == [2]
    assert mean.result().tolist() == [3]


def test_an_array_longer_than_a_block_is_summed_to_its_end():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(2 * BLOCK + 17).astype(np.float32) for _ in range(3)]
    got = mean_of([(array, weight) for array, weight in zip(arrays, (1, 2, 3), strict=True)])
    truth = np.average(np.stack(arrays).astype(float), axis=0, weights=(1, 2, 3))
    np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-7)


@given(cohorts)
@settings(deadline=None)
def test_the_mean_is_numpys_average_in_any_order(contributions):
    stacked = np.stack([values for values, _ in contributions]).astype(float)
    weights = [weight for _, weight in contributions]
    truth = np.average(stacked, axis=0, weights=weights).astype(np.float32)
    # One float32 rounding, and float64 sums whose terms reach 1e3.
    for order in (contributions, contributions[::-1]):
        np.testing.assert_allclose(mean_of(order), truth, rtol=1.2e-7, atol=1e-11)


@given(cohorts, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_only_the_proportions_of_weights_count(contributions, factor):
    scaled = [(values, weight * factor) for values, weight in contributions]
    np.testing.assert_allclose(mean_of(scaled), mean_of(contributions), rtol=1.2e-7, atol=1e-11)


@given(cohorts)
@settings(deadline=None)
def test_equal_contributions_come_back_bit_for_bit(contributions):
    values = contributions[0][0]
    result = mean_of([(values, weight) for _, weight in contributions])
    np.testing.assert_allclose(result, values, rtol=1.2e-7, atol=0)
    np.testing.assert_array_equal(mean_of([(values, 1)] * 4), values)


def test_half_precision_is_summed_wide(relative_error):
    rng = np.random.default_rng(0)
    halves = [rng.standard_normal(4096).astype(np.float16) for _ in range(50)]
    weights = rng.integers(20, 200, 50)
    truth = np.average(np.stack(halves).astype(float), axis=0, weights=weights)
    got = mean_of([(half, float(weight)) for half, weight in zip(halves, weights, strict=True)])
    assert relative_error(got, truth) < 1e-6

    naive = np.zeros(4096, np.float16)
    for half, weight in zip(halves, weights / weights.sum(), strict=True):
        naive += half * np.float16(weight)
    assert relative_error(naive, truth) > 1e-4


def test_half_precision_with_many_examples_does_not_overflow():
    contributions = [(np.full(3, 20.0, np.float16), 5000.0)] * 20
    np.testing.assert_array_equal(mean_of(contributions), np.full(3, 20.0, np.float32))


@pytest.mark.parametrize("shape", [(1,), (7,), (8, 1), (1, 8), ()])
def test_another_shape_is_refused_and_never_broadcast(shape):
    mean = RunningMean(8)
    with pytest.raises(ShapeError, match=r"client 12: expected shape \(8,\), got"):
        mean.add(np.ones(shape, np.float32), 1, client=12)


@pytest.mark.parametrize(
    ("values", "weight", "message"),
    [
        ([1, np.nan], 1, "client 1: expected finite values, got 1 of 2"),
        ([np.inf, 1], 1, "client 1: expected finite values, got 1 of 2"),
        ([1, 1], 0, "client 1: weight"),
        ([1, 1], float("nan"), "client 1: weight"),
    ],
)
def test_a_refused_contribution_leaves_the_mean_as_it_was(values, weight, message):
    mean = RunningMean(2)
    mean.add(np.array([1, 2], np.float32), 3)
    with pytest.raises(WireError, match=message):
        mean.add(np.array(values, np.float32), weight)
    mean.add(np.array([3, 6], np.float32), 1)
    assert mean.count == 2
    assert mean.result().tolist() == [1.5, 3.0]


def test_no_clients_and_no_size_are_refused():
    with pytest.raises(WireError, match="expected at least one client"):
        RunningMean(2).result()
    with pytest.raises(ValueError, match="size: expected > 0, got 0"):
        RunningMean(0)


def peak_bytes_of_a_mean_over(cohort, size):
    mean = RunningMean(size)
    tracemalloc.start()
    for client in range(cohort):
        mean.add(np.full(size, client, np.float32), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_cohort():
    few, many = (peak_bytes_of_a_mean_over(cohort, 50_000) for cohort in (4, 40))
    assert (
        many < 1.2 * few
    )  # the interpreter's own small objects; one kept array would add 200 kB a client
