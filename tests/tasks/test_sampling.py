import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.sampling import hash_rank, hold_out, shuffled, spread, subsample

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)


def make_rows(sizes):
    return tuple(
        Row(f"{label}-{number}", f"text {label} {number}", str(label), label)
        for label, size in enumerate(sizes)
        for number in range(size)
    )


@given(SIZES, st.integers(0, 3), st.data())
def test_spread_takes_the_count_and_each_stratum_its_share(sizes, seed, data):
    rows = make_rows(sizes)
    count = data.draw(st.integers(0, len(rows)))
    chosen = spread(
        rows, count, lambda row: row.label, lambda row: hash_rank(seed, "t", row.row_id)
    )
    assert len(chosen) == len(set(chosen)) == count
    found = Counter(row.label for row in chosen)
    for label, size in enumerate(sizes):
        assert abs(found[label] - size * count / max(len(rows), 1)) < 1


@given(SIZES, st.integers(1, 40), st.randoms())
def test_a_subsample_does_not_depend_on_the_order_of_rows(sizes, count, shuffler):
    rows = make_rows(sizes)
    other = list(rows)
    shuffler.shuffle(other)
    kept = subsample(rows, count, 7, "t")
    assert len(kept) == min(count, len(rows))
    assert set(kept) == set(subsample(tuple(other), count, 7, "t"))
    assert list(kept) == [row for row in rows if row in set(kept)]


def test_subsample_counts_that_keep_all_or_nothing():
    rows = make_rows([3, 4])
    assert subsample(rows, 0, 0, "t") == rows
    assert subsample(rows, 99, 0, "t") == rows
    assert subsample(rows, -1, 0, "t") == ()


def test_seed_and_purpose_change_the_choice():
    rows = make_rows([50, 50])
    chosen = {
        frozenset(row.row_id for row in subsample(rows, 20, seed, purpose))
        for seed in (0, 1)
        for purpose in ("a", "b")
    }
    assert len(chosen) == 4


@given(SIZES, st.floats(0.05, 0.95))
def test_hold_out_divides_rows_and_keeps_units_whole(sizes, fraction):
    rows = make_rows(sizes)

    def unit(row):
        return row.row_id[:3]  # "1-1" with "1-10" to "1-19"

    kept, held = hold_out(rows, fraction, 3, "t", unit=unit)
    assert sorted(kept + held, key=rows.index) == list(rows)
    assert not {unit(row) for row in kept} & {unit(row) for row in held}
    units = len({unit(row) for row in rows})
    if units >= 2:
        assert kept
        assert held
    assert len({unit(row) for row in held}) == pytest.approx(fraction * units, abs=1)


def test_shuffled_is_a_permutation_that_the_seed_decides():
    rows = make_rows([40])
    first, second = shuffled(rows, 0, "t"), shuffled(rows, 1, "t")
    assert set(first) == set(second) == set(rows)
    assert first != second != list(rows)
    reordered = list(rows)
    random.Random(0).shuffle(reordered)
    assert shuffled(reordered, 0, "t") == first


def test_another_process_ranks_the_same():
    code = "from fedllm_flwr.tasks.sampling import hash_rank; print(hash_rank(5, 'p', 'k'))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(answer.stdout) == hash_rank(5, "p", "k")


def test_hash_rank_spreads_evenly():
    # 4,000 draws into 8 bins: the chance that any bin is off by more than 5 sd (21 x 5) is < 1e-5.
    bins = Counter(hash_rank(0, "even", str(number)) >> 61 for number in range(4000))
    assert bins.keys() == set(range(8))
    assert max(abs(size - 500) for size in bins.values()) < 105


def test_spread_of_nothing_is_nothing():
    assert spread([], 0, str, str) == []


@pytest.mark.parametrize("rows", [(), make_rows([1])])
def test_hold_out_of_too_little_keeps_it(rows):
    assert hold_out(rows, 0.1, 0, "t") == (rows, ())
