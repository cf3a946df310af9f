import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError, ShapeError, VerificationError, WireError
from fedllm_flwr.unlearning.exact_merge import LIMIT, UNIT, ExactSum

SIZE = 64


def updates_of(count, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-6, 2, size=(count, 1))
    return (rng.standard_normal((count, SIZE)) * scales).astype(np.float32)


def sum_of(updates, clients, weights=None):
    exact = ExactSum(SIZE)
    for client in clients:
        exact.add(client, updates[client], 1 if weights is None else weights[client])
    return exact


def bits(exact):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in exact.arrays().items()}


@given(st.randoms(use_true_random=False), st.integers(0, 50), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_removed_client_leaves_no_trace_in_any_order(random, removed, seed):
    """Clients come in one order and some go in another, in between; the others come in a third."""
    updates = updates_of(50, seed)
    weights = [random.randint(1, 200) for _ in range(50)]
    gone = random.sample(range(50), removed)
    events = [("add", client) for client in range(50)]
    random.shuffle(events)
    for client in gone:
        after = events.index(("add", client)) + 1
        events.insert(random.randint(after, len(events)), ("remove", client))
    exact = ExactSum(SIZE)
    for what, client in events:
        if what == "add":
            exact.add(client, updates[client], weights[client])
        else:
            exact.remove(client, updates[client])
    stayed = [client for client in range(50) if client not in gone]
    random.shuffle(stayed)
    assert bits(exact) == bits(sum_of(updates, stayed, weights))


@pytest.mark.parametrize("removed", [1, 5, 20])
def test_removing_some_of_fifty_is_never_having_added_them(removed):
    updates = updates_of(50)
    exact = sum_of(updates, range(50))
    rng = np.random.default_rng(removed)
    gone = rng.choice(50, removed, replace=False).tolist()
    for client in gone:
        exact.remove(client, updates[client])
    stayed = rng.permutation([client for client in range(50) if client not in gone]).tolist()
    never = sum_of(updates, stayed)
    assert bits(exact) == bits(never)
    assert exact.total().tobytes() == never.total().tobytes()


def test_float_sums_do_leave_a_trace():
    """Why integers: the same in float64 and float32 is not bit-equal."""
    for dtype in (np.float32, np.float64):
        updates = np.random.default_rng(0).standard_normal((50, SIZE)).astype(dtype)
        subtracted = updates.sum(0) - updates[7]
        assert (subtracted != np.delete(updates, 7, axis=0).sum(0)).mean() > 0.3


@given(st.integers(1, 20), st.integers(0, 999))
@settings(deadline=None)
def test_rounding_moves_a_mean_by_half_a_unit_at_most(count, seed):
    updates = np.random.default_rng(seed).uniform(-1, 1, (count, SIZE))
    exact = sum_of(updates, range(count))
    assert (
        np.abs(exact.total() / count - updates.mean(0)).max() <= UNIT / 2 + 4 * np.finfo(float).eps
    )
    assert abs(UNIT / 2 - 4.5e-13) < 1e-14


def test_floats_of_usual_size_are_not_moved_at_all():
    values = (np.arange(1, SIZE + 1) * np.float32(2**-17 * 1.2345678)).astype(np.float32)
    exact = ExactSum(SIZE)
    exact.add(3, values)
    np.testing.assert_array_equal(exact.total(), values.astype(np.float64))


def test_weights_are_whole_and_divided_out():
    exact = ExactSum(2)
    exact.add(4, np.array([1, 0], np.float32), 1)
    exact.add(2, np.array([3, 4], np.float32), 3)
    assert exact.clients == (2, 4)
    assert exact.total_weight == 4
    assert exact.total().tolist() == [10, 12]
    exact.remove(2, np.array([3, 4], np.float64))
    assert exact.total().tolist() == [1, 0]
    assert exact.total_weight == 1


def test_state_goes_through_arrays_and_back():
    updates = updates_of(9)
    exact = sum_of(updates, range(8), [3, 1, 4, 1, 5, 9, 2, 6])
    again = ExactSum.from_arrays(exact.arrays())
    assert bits(again) == bits(exact)
    for each in (exact, again):
        each.remove(5, updates[5])
        each.add(8, updates[8])
    assert bits(again) == bits(exact)
    assert bits(ExactSum.from_arrays(ExactSum(3).arrays())) == bits(ExactSum(3))


def test_arrays_of_another_form_are_refused():
    arrays = sum_of(updates_of(2), range(2)).arrays()
    with pytest.raises(ShapeError, match="got no digests"):
        ExactSum.from_arrays({name: a for name, a in arrays.items() if name != "digests"})
    with pytest.raises(ShapeError, match="weights: expected"):
        ExactSum.from_arrays(arrays | {"weights": arrays["weights"][:1]})
    with pytest.raises(ShapeError, match=r"sum: expected .*int64.*float64"):
        ExactSum.from_arrays(arrays | {"sum": arrays["sum"].astype(np.float64)})


def test_a_sum_that_could_overflow_is_refused_whatever_the_order():
    """The bound is over magnitudes, so that no order of the same clients gets through."""
    big = LIMIT * UNIT / 2
    for order in ((1, 2, 3), (3, 2, 1), (2, 3, 1)):
        exact = ExactSum(1)
        values = {1: np.array([big * 0.9]), 2: np.array([-big * 0.9]), 3: np.array([big * 0.9])}
        for client in order[:2]:
            exact.add(client, values[client])
        before = bits(exact)
        with pytest.raises(
            WireError, match=rf"client {order[2]}: .* up to 8388608, got 1.132.*e\+07"
        ):
            exact.add(order[2], values[order[2]])
        assert bits(exact) == before
    with pytest.raises(WireError, match="client 7: expected magnitudes up to 8388608, got 1e"):
        ExactSum(1).add(7, np.array([1e7]))
    with pytest.raises(WireError, match=r"client 7: .*sum of largest magnitudes"):
        ExactSum(1).add(7, np.array([1.0]), 10**8)


def test_a_client_leaves_with_what_it_brought_or_not_at_all():
    updates = updates_of(3)
    exact = sum_of(updates, range(2))
    before = bits(exact)
    other = updates[1].copy()
    other[5] = np.nextafter(other[5], np.float32(np.inf)) + np.float32(1e-6)
    with pytest.raises(VerificationError, match="client 1: expected the update that was added"):
        exact.remove(1, other)
    assert bits(exact) == before


def test_bad_input_is_refused_and_leaves_the_sum_as_it_was():
    updates = updates_of(3)
    exact = sum_of(updates, range(2))
    before = bits(exact)
    with pytest.raises(ConfigError, match=r"client 1: .* got one that is"):
        exact.add(1, updates[1])
    with pytest.raises(ConfigError, match=r"client 2: .* got one that is not in it"):
        exact.remove(2, updates[2])
    with pytest.raises(ShapeError, match=r"client 2: expected shape \[64\], got \[63\]"):
        exact.add(2, updates[2][:63])
    with pytest.raises(WireError, match="client 2: expected finite values, got 64 of 64"):
        exact.add(2, updates[2] * np.float32(np.nan))
    for weight in (0, -1, 1.5):
        with pytest.raises(WireError, match="whole number > 0"):
            exact.add(2, updates[2], weight)
    with pytest.raises(ConfigError, match="expected > 0, got 0"):
        ExactSum(0)
    assert bits(exact) == before


def test_a_sum_may_be_filled_to_the_last_unit():
    """2**63 - 1 is 649657 times a whole number that a float64 holds."""
    weight = 649657
    exact = ExactSum(1)
    exact.add(0, np.array([LIMIT // weight * UNIT]), weight)
    assert LIMIT % weight == 0
    assert exact.arrays()["sum"].tolist() == [LIMIT]
    with pytest.raises(WireError, match="client 1: expected a sum of largest magnitudes"):
        exact.add(1, np.array([UNIT]))


def test_a_weight_that_was_changed_on_the_disk_is_found():
    exact = ExactSum(2)
    exact.add(0, np.ones(2), 2)
    arrays = exact.arrays()
    arrays["weights"][:] = 3
    with pytest.raises(VerificationError, match="client 0: expected the update that was added"):
        ExactSum.from_arrays(arrays).remove(0, np.ones(2))
