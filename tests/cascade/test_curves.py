from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.cascade import Price, TierOutcomes, levels_of, total_cost
from fedllm_flwr.cascade.curves import (
    Walk,
    always,
    bootstrap_means,
    cascade,
    check_tiers,
    matched,
    oracle,
    random_deferral,
    resampled,
)
from fedllm_flwr.errors import ShapeError

Make = Callable[..., TierOutcomes]


def tier(
    name: str, levels: list[float], correct: list[int], cost: int = 1, members: int = 3
) -> TierOutcomes:
    size = len(levels)
    return TierOutcomes(
        name, members, np.array(levels), np.array(levels) > 0, np.array(correct, bool),
        np.full(size, cost), np.zeros(size, np.int64),
    )  # fmt: skip


SMALL = tier("small", [1.0, 2 / 3, 1.0, 1 / 3, 0.0], [1, 0, 0, 1, 0], cost=3)
LARGE = tier("large", [1.0] * 5, [1, 1, 0, 1, 1], cost=10, members=1)
CHAIN = [SMALL, LARGE]


def test_a_cascade_by_hand() -> None:
    walk = cascade(CHAIN, [2 / 3])
    assert walk.answered.tolist() == [0, 0, 0, 1, 1]
    assert walk.correct(CHAIN).tolist() == [True, False, False, True, True]
    assert walk.cost(CHAIN).tolist() == [3, 3, 3, 13, 13]
    assert walk.reached().tolist() == [5, 2]
    assert walk.tokens(CHAIN) == {"small": (15, 0), "large": (20, 0)}
    assert cascade(CHAIN, [0.0]).answered.tolist() == [0, 0, 0, 0, 1], "no answer is never accepted"
    assert cascade(CHAIN, [1.1]).answered.tolist() == [1] * 5


def test_baselines_by_hand() -> None:
    assert always(CHAIN, 0).cost(CHAIN).sum() == 15
    assert always(CHAIN, -1).cost(CHAIN).sum() == 50
    assert always(CHAIN, -1).correct(CHAIN).sum() == 4
    best = oracle(CHAIN)
    assert best.answered.tolist() == [0, 1, 1, 0, 1], "right in the first, else the last"
    assert best.correct(CHAIN).tolist() == [True, True, False, True, True]
    assert best.cost(CHAIN).tolist() == [3, 10, 10, 3, 10], "a router pays for one tier only"


def test_random_deferral_by_hand() -> None:
    found = random_deferral(CHAIN, cascade(CHAIN, [2 / 3]))
    assert found.accuracy == pytest.approx(0.6 * 2 / 5 + 0.4 * 4 / 5)
    assert found.cost == pytest.approx(3 + 0.4 * 10)


def test_random_deferral_is_what_drawing_gives_on_average() -> None:
    rng = np.random.default_rng(0)
    walk = cascade(CHAIN, [2 / 3])
    draws = []
    for _ in range(4000):
        deferred = np.zeros(5, bool)
        deferred[rng.permutation(5)[:2]] = True
        drawn = Walk(np.stack([np.ones(5, bool), deferred], axis=1), deferred.astype(int))
        draws.append((drawn.correct(CHAIN).mean(), drawn.cost(CHAIN).mean()))
    accuracy, cost = np.mean(draws, axis=0)
    found = random_deferral(CHAIN, walk)
    assert accuracy == pytest.approx(found.accuracy, abs=0.02)
    assert cost == pytest.approx(found.cost, abs=1e-9)


def test_another_signal_defers_as_many_but_its_own_choice() -> None:
    other = tier("small", [0.9, 0.8, 0.3, 0.7, 0.95], [1, 0, 0, 1, 0], members=1)
    walk = matched([other, LARGE], cascade(CHAIN, [2 / 3]))
    assert walk.answered.tolist() == [0, 0, 1, 1, 0]
    three = [other, tier("middle", [0.1, 0.9, 0.5, 0.2, 0.3], [1] * 5), LARGE]
    like = cascade([SMALL, tier("middle", [1.0, 1.0, 1.0, 0.3, 1.0], [1] * 5), LARGE], [2 / 3, 0.5])
    assert like.answered.tolist() == [0, 0, 0, 2, 1]
    assert matched(three, like).answered.tolist() == [0, 0, 1, 2, 0]


def test_an_unparsed_answer_is_deferred_before_one_of_the_least_score() -> None:
    scored = tier("small", [0.0, 0.9, 0.0, 0.9, 0.9], [1] * 5, members=1)
    scored = replace(scored, parsed=np.array([True, True, False, True, True]))
    one = cascade([tier("small", [1.0, 1.0, 1.0, 1.0, 0.0], [1] * 5), LARGE], [0.5])
    assert matched([scored, LARGE], one).answered.tolist() == [0, 0, 1, 0, 0]


@pytest.fixture
def simulated(
    make_tier: Make, draw_labels: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> Callable[..., list[TierOutcomes]]:
    def made(seed: int, tiers: int = 3, members: int = 3, queries: int = 40) -> list[TierOutcomes]:
        rng = np.random.default_rng(seed)
        _, truth = draw_labels(queries, members, seed)
        found = []
        for place in range(tiers):
            known = rng.random((queries, members)) < 0.4 + 0.2 * place
            labels = np.where(
                known, truth[:, None], rng.integers(0, 4, (queries, members)).astype(str)
            )
            labels = np.where(rng.random(labels.shape) < 0.1, None, labels)
            price = Price(
                Fraction(int(rng.integers(0, 5)), 10), Fraction(int(rng.integers(0, 5)), 10)
            )
            found.append(
                make_tier(
                    labels.tolist(), truth.tolist(), f"t{place}", int(rng.integers(0, 9)), price
                )
            )
        return found

    return made


@pytest.mark.parametrize("seed", range(8))
def test_no_cascade_is_cheaper_than_its_first_tier_and_no_token_is_lost(
    seed: int, simulated: Callable[..., list[TierOutcomes]]
) -> None:
    tiers = simulated(seed)
    prices = {t.tier: t.price for t in tiers}
    before = -1.0
    for theta in [0.0, *levels_of(3), 2.0]:
        walk = cascade(tiers, [theta] * 2)
        assert (walk.cost(tiers) >= tiers[0].cost).all(), "not even for one query"
        from_tokens = total_cost(walk.tokens(tiers), prices)
        assert walk.cost(tiers).sum() == pytest.approx(float(sum(from_tokens.values())))
        by_tier = [float((t.cost * walk.paid[:, place]).sum()) for place, t in enumerate(tiers)]
        assert by_tier == pytest.approx([float(cost) for cost in from_tokens.values()])
        assert walk.cost(tiers).sum() >= before - 1e-9, "a higher threshold never costs less"
        before = walk.cost(tiers).sum()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_over_the_same_tiers_beats_the_oracle(
    seed: int, simulated: Callable[..., list[TierOutcomes]]
) -> None:
    tiers = simulated(seed)
    best = oracle(tiers).correct(tiers)
    assert best.tolist() == np.any([t.correct for t in tiers], axis=0).tolist()
    for theta in levels_of(3):
        assert (best >= cascade(tiers, [theta] * 2).correct(tiers)).all()


def test_always_deferring_pays_for_all_tiers_and_answers_as_the_last(
    simulated: Callable[..., list[TierOutcomes]],
) -> None:
    tiers = simulated(1)
    walk = cascade(tiers, [2.0, 2.0])
    np.testing.assert_array_equal(walk.correct(tiers), always(tiers, -1).correct(tiers))
    np.testing.assert_allclose(walk.cost(tiers), sum(t.cost for t in tiers))


def test_time_adds_up_over_the_tiers_that_were_called() -> None:
    def timed(name: str, serial: float, parallel: float) -> TierOutcomes:
        plain = tier(name, [1.0, 0.5], [1, 1])
        fields = {
            **vars(plain),
            "serial_seconds": np.full(2, serial),
            "parallel_seconds": np.full(2, parallel),
        }
        return TierOutcomes(**fields)

    tiers = [timed("a", 3.0, 1.0), timed("b", 8.0, 4.0)]
    walk = cascade(tiers, [0.8])
    serial, parallel = (walk.seconds(tiers, parallel=side) for side in (False, True))
    assert serial is not None
    assert parallel is not None
    assert (serial.tolist(), parallel.tolist()) == ([3, 11], [1, 5])
    assert cascade(CHAIN, [0.5]).seconds(CHAIN, parallel=True) is None


def test_the_bootstrap_covers_and_draws_the_same_queries_for_all_columns() -> None:
    rng = np.random.default_rng(3)
    values = rng.random((200, 1))
    low, high = bootstrap_means(np.hstack([values, 1 - values]), np.random.default_rng(1))
    error = values.std() / np.sqrt(200)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low[0] == pytest.approx(1 - high[1])
    np.testing.assert_array_equal(bootstrap_means(np.ones((3, 1)), rng), [[1], [1]])


@given(st.integers(1, 50), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_every_sample_has_as_many_queries(queries: int, replicates: int) -> None:
    counts = np.concatenate(list(resampled(queries, np.random.default_rng(0), replicates)))
    assert counts.shape == (replicates, queries)
    assert (counts.sum(axis=1) == queries).all()


def test_large_samples_come_in_parts() -> None:
    parts = list(resampled(2**19, np.random.default_rng(0), 3))
    assert [part.shape for part in parts] == [(2, 2**19), (1, 2**19)]


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ShapeError, match="expected tiers of the same queries, got"):
        check_tiers([SMALL, tier("x", [1.0], [1])])
    with pytest.raises(ShapeError, match="expected 1 thresholds for 2 tiers, got 2"):
        cascade(CHAIN, [0.5, 0.5])
    with pytest.raises(ShapeError, match="tier x: expected arrays of one length"):
        tier("x", [1.0, 1.0], [1])
