import math

import numpy as np
import pytest
from hypothesis import strategies as st

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.tasks.metrics import (
    Counts,
    accuracies,
    count_correct,
    pooled,
)

COUNTS = st.integers(0, 200).flatmap(
    lambda total: st.builds(Counts, st.integers(0, total), st.just(total))
)


def test_the_pooled_accuracy_is_not_the_mean_of_accuracies():
    parts = [Counts(1, 1), Counts(0, 9)]
    assert pooled(parts).accuracy == 0.1
    assert parts[0] + parts[1] == pooled(parts) == Counts(1, 10)


def test_no_rows_give_no_figure():
    assert math.isnan(Counts().accuracy)
    assert accuracies([Counts(), Counts(1, 2)]) == [0.5]


@pytest.mark.parametrize("counts", [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ShapeError, match=r"^counts: expected 0 <= correct <= total, got"):
        Counts(*counts)


def test_count_correct_compares_rows():
    assert count_correct(np.array([1, 2, 0]), np.array([1, 0, 0])) == Counts(2, 3)
    with pytest.raises(
        ShapeError, match=r"^predictions: expected the labels' shape \(2,\), got \(3,\)"
    ):
        count_correct(np.zeros(3), np.zeros(2))
