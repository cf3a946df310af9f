from collections.abc import Callable

import numpy as np
import pytest

from fedllm_flwr.cascade.curves import always, cascade
from fedllm_flwr.cascade.outcomes import TierOutcomes
from fedllm_flwr.cascade.routing import promise, routed
from fedllm_flwr.errors import ShapeError

EASY, HARD = "shares rise on good earnings", "wheat harvest falls after drought"


def test_words_of_queries_that_went_wrong_promise_less() -> None:
    known = [EASY, HARD, "earnings rise", "drought harms wheat"] * 5
    right = np.array([True, False, True, False] * 5)
    found = promise(known, right, ["good earnings", "drought", "nothing known"])
    assert found is not None
    assert found[0] > 0.5 > found[1]
    assert found[0] > found[2] > found[1]


@pytest.mark.parametrize("outcome", [True, False])
def test_nothing_is_learned_where_all_answers_are_alike(outcome: bool) -> None:
    assert promise([EASY, HARD], np.array([outcome] * 2), [EASY]) is None


def test_the_least_promising_go_straight_to_the_last_tier(
    make_tier: Callable[..., TierOutcomes],
) -> None:
    truth = list("aaaa")
    small = make_tier([["a", "a"], ["a", "b"], ["b", "a"], ["a", "a"]], truth)
    middle = make_tier([["a"]] * 4, truth, "middle")
    large = make_tier([["a"]] * 4, truth, "large")
    tiers = [small, middle, large]
    like = cascade(tiers, [1.0, 1.0])
    walk = routed(tiers, like, np.array([0.9, 0.1, 0.8, 0.2]))
    assert walk.answered.tolist() == [0, 2, 0, 2], (
        "two queries leave the first tier, as in the cascade"
    )
    assert walk.paid.sum(axis=1).tolist() == [1, 1, 1, 1]
    assert walk.cost(tiers).sum() == always(tiers, 0).cost(tiers)[:2].sum() + 2 * large.cost[0]


def test_lengths_have_to_fit(make_tier: Callable[..., TierOutcomes]) -> None:
    with pytest.raises(ShapeError, match="an outcome for each of 2 texts, got 1"):
        promise([EASY, HARD], np.array([True]), [])
    tiers = [make_tier([["a"]], ["a"]), make_tier([["a"]], ["a"], "large")]
    with pytest.raises(ShapeError, match="expected 1 probabilities"):
        routed(tiers, always(tiers, 0), np.array([0.1, 0.2]))
