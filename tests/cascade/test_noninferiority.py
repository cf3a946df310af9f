import numpy as np
import pytest

from fedllm_flwr.cascade.noninferiority import most_lost
from fedllm_flwr.errors import ConfigError, ShapeError


def test_by_hand() -> None:
    """100 queries, 6 lost and 2 won: (6.5 - 2.5) / 102 + 1.6449 sqrt(9 - 16 / 102) / 102."""
    reference = np.array([True] * 6 + [False] * 2 + [True] * 92)
    candidate = np.array([False] * 6 + [True] * 2 + [True] * 92)
    wanted = 4 / 102 + 1.6448536 * np.sqrt(9 - 16 / 102) / 102
    assert most_lost(candidate, reference) == pytest.approx(wanted)


def test_equal_answers_are_no_proof_on_few_queries() -> None:
    for queries, below in ((20, 0.08), (2000, 0.001)):
        same = np.ones(queries, bool)
        assert 0 < most_lost(same, same) < below
    few = np.ones(20, bool)
    assert most_lost(few, few) > 0.05, "20 queries cannot show a margin of 5 points"


def test_the_bound_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        easy = random.random(150)
        reference, candidate = easy < 0.9, (easy < 0.84) | (random.random(150) < 0.1)
        # lost where 0.84 <= easy < 0.9 and not lucky, won where easy >= 0.9 and lucky
        truth = 0.06 * 0.9 - 0.1 * 0.1
        held += most_lost(candidate, reference) >= truth
    assert 0.92 <= held / 400 <= 0.99


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="answers to the same queries"):
        most_lost(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ConfigError, match="confidence in"):
        most_lost(np.ones(2, bool), np.ones(2, bool), 1.0)
