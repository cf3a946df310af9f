import numpy as np
import pytest

from fedllm_flwr.cascade.noninferiority import most_lost
from fedllm_flwr.errors import ConfigError, ShapeError


def test_without_a_difference_it_is_the_score_bound_of_a_share() -> None:
    """z² / (n + z²), Wilson's bound of 0 of n."""
    for queries in (20, 500):
        same = np.ones(queries, bool)
        assert most_lost(same, same) == pytest.approx(
            1.6448536**2 / (queries + 1.6448536**2), rel=1e-4
        )
    few = np.ones(20, bool)
    assert most_lost(few, few) > 0.1, "20 queries cannot show a margin of 10 points"


def test_zero_is_ruled_out_where_mcnemars_test_rejects() -> None:
    """z = (lost - won) / sqrt(lost + won): 1.5 for 7 and 2 keeps no loss possible, for a gain of 9 to 2 it is 2.1."""

    def bound(lost: int, won: int) -> float:
        reference = np.array([True] * lost + [False] * won + [True] * 90)
        candidate = np.array([False] * lost + [True] * won + [True] * 90)
        return most_lost(candidate, reference)

    assert bound(2, 9) < 0 < bound(2, 5)
    assert bound(7, 2) > (7 - 2) / 99
    assert bound(9, 2) > bound(7, 2) > bound(5, 2)
    reference = np.ones(5, bool)
    assert most_lost(~reference, reference) == 1.0


@pytest.mark.parametrize(("lost", "won"), [(0.054, 0.01), (0.02, 0.02), (0.1, 0.02)])
def test_the_bound_covers_the_truth_about_as_often_as_it_says(lost: float, won: float) -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        drawn = random.random(150)
        candidate, reference = drawn >= lost, (drawn < lost) | (drawn >= lost + won)
        held += most_lost(candidate, reference) >= lost - won
    assert 0.92 <= held / 500 <= 0.99


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="answers to the same queries"):
        most_lost(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ConfigError, match="confidence in"):
        most_lost(np.ones(2, bool), np.ones(2, bool), 1.0)
