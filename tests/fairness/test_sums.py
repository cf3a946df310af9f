import math

import pytest

from fedllm_flwr.errors import WireError
from fedllm_flwr.fairness import GroupSums, pool, present


def test_figures_of_a_group_by_hand():
    sums = GroupSums(3.0, 3, 4) + GroupSums(1.0, 0, 4)
    assert sums == GroupSums(4.0, 3, 8)
    assert (sums.mean_loss, sums.accuracy, sums.error) == (0.5, 0.375, 0.625)


def test_a_group_without_rows_has_no_figures():
    empty = GroupSums()
    assert all(math.isnan(value) for value in (empty.mean_loss, empty.accuracy, empty.error))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, 3, 2), "expected 0 <= correct <= total, got 3 of 2"),
        ((1.0, -1, 2), "expected 0 <= correct <= total, got -1 of 2"),
        ((-0.5, 1, 2), "expected a finite loss >= 0, got -0.5"),
        ((math.nan, 1, 2), "expected a finite loss >= 0, got nan"),
        ((math.inf, 1, 2), "expected a finite loss >= 0, got inf"),
        ((0.5, 0, 0), "expected no loss without rows, got 0.5"),
    ],
)
def test_impossible_sums_are_refused(values, message):
    with pytest.raises(WireError, match=f"^group sums: {message}$"):
        GroupSums(*values)


def test_clients_that_lack_groups_are_added_up():
    parts = [
        {"b": GroupSums(1.0, 1, 2)},
        {},
        {"a": GroupSums(2.0, 0, 1), "b": GroupSums(0.5, 1, 1)},
    ]
    pooled = pool(parts)
    assert pooled == {"a": GroupSums(2.0, 0, 1), "b": GroupSums(1.5, 2, 3)}
    assert list(pooled) == ["a", "b"]
    assert pool(reversed(parts)) == pooled
    assert pool([]) == {}


def test_small_and_empty_groups_can_be_left_out():
    sums = {"b": GroupSums(1.0, 1, 9), "a": GroupSums(), "c": GroupSums(1.0, 1, 10)}
    assert list(present(sums)) == ["b", "c"]
    assert list(present(sums, 10)) == ["c"]
