import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import WireError
from fedllm_flwr.grass.averaging import RowMean
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import RowRule, choose_rows


def update(rows: list[int], *values: float) -> RowUpdate:
    return RowUpdate(np.array(rows, np.int64), np.array(values, np.float32)[:, None])


def test_by_hand() -> None:
    for average, expected in (("clients", [2.0, 1.5, 0.75]), ("counts", [8.0, 1.5, 1.0])):
        mean = RowMean(average)  # type: ignore[arg-type]
        mean.add({"w": update([1, 5], 3.0, 1.0)}, 2.0)
        mean.add({"w": update([0, 1, 5], 8.0, 1.0, 1.0)}, 1.0)
        mean.add({"w": update([1], -1.0)}, 1.0)
        found = mean.result()["w"]
        np.testing.assert_array_equal(found.indices, [0, 1, 5])
        assert found.values.dtype == np.float32
        np.testing.assert_allclose(found.values[:, 0], expected)


@given(st.lists(st.sets(st.integers(0, 6), min_size=1), min_size=1, max_size=4), st.integers(0, 99))
def test_it_is_the_mean_of_the_scattered_matrices(chosen: list[set[int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    total, weights = np.zeros((7, 2)), random.integers(1, 9, len(chosen))
    mean = RowMean("clients")
    for rows, weight in zip(chosen, weights, strict=True):
        values = random.standard_normal((len(rows), 2)).astype(np.float32)
        mean.add({"w": RowUpdate(np.array(sorted(rows)), values)}, float(weight))
        total[sorted(rows)] += weight * values
    found, dense = mean.result()["w"], np.zeros((7, 2))
    dense[found.indices] = found.values
    np.testing.assert_allclose(dense, total / weights.sum(), atol=1e-6)


def test_shared_rows_have_one_mean_whatever_the_divisor() -> None:
    found = {}
    for average in ("clients", "counts"):
        mean = RowMean(average)  # type: ignore[arg-type]
        mean.add({"w": update([2, 3], 1.0, 2.0)}, 3.0)
        mean.add({"w": update([2, 3], 5.0, 6.0)}, 1.0)
        found[average] = mean.result()["w"].values
    np.testing.assert_array_equal(found["clients"], found["counts"])


@pytest.mark.parametrize(
    ("rule", "average", "unbiased"),
    [
        ("norm2_r", "clients", True),
        ("uniform_r", "clients", True),
        ("norm2_r", "counts", False),
        ("norm_nr", "clients", False),
        ("norm_nr", "counts", False),
    ],
)
def test_one_sgd_step_from_own_rows_is_unbiased_only_where_it_is_said(
    rule: RowRule, average: str, unbiased: bool
) -> None:
    """Two clients with gradients of their own draw 2 of 5 rows each, and move them by the scale squared."""
    random = np.random.default_rng(4)
    gradients = [np.array([4.0, -2, 1, 0.5, 3])[:, None], np.array([1.0, 1, 5, -2, 0.3])[:, None]]
    whole = sum(gradients) / 2
    draws = []
    for _ in range(4000):
        mean = RowMean(average)  # type: ignore[arg-type]
        for gradient in gradients:
            rows = choose_rows(gradient[:, 0] ** 2, 2, rule, random)
            moved = rows.scales[:, None] ** 2 * gradient[rows.indices]
            mean.add({"w": RowUpdate(rows.indices, moved.astype(np.float32))}, 1.0)
        found, dense = mean.result()["w"], np.zeros((5, 1))
        dense[found.indices] = found.values
        draws.append(dense)
    error = np.abs(np.mean(draws, axis=0) - whole) / (np.std(draws, axis=0) / np.sqrt(len(draws)))
    assert (error.max() < 4.5) == unbiased


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(WireError, match="mean of rows: expected at least one client"):
        RowMean("clients").result()
