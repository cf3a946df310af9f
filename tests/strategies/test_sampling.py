import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from strategies.sampling import draw_cohort, draw_poisson_cohort

CLIENTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True)


@given(CLIENTS, st.floats(1e-6, 1.0), st.integers(0, 2**40), st.integers(1, 10**6))
def test_a_cohort_is_a_sorted_part_of_the_clients(
    clients: list[int], fraction: float, seed: int, server_round: int
) -> None:
    cohort = draw_cohort(seed, server_round, clients, fraction)
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(clients)
    assert len(cohort) >= 1
    assert abs(len(cohort) - fraction * len(clients)) <= 0.5 or len(cohort) == 1


@pytest.mark.parametrize(
    ("clients", "fraction", "size"),
    [(8, 1.0, 8), (8, 0.5, 4), (5, 0.5, 3), (10, 0.04, 1), (3, 0.1, 1)],
)
def test_sizes_round_half_up_and_never_to_nothing(clients: int, fraction: float, size: int) -> None:
    assert len(draw_cohort(0, 1, range(clients), fraction)) == size


def test_the_address_of_a_draw_is_seed_and_round() -> None:
    clients = range(100)
    first = draw_cohort(7, 3, clients, 0.1)
    assert draw_cohort(7, 3, clients, 0.1) == first
    assert draw_cohort(7, 4, clients, 0.1) != first
    assert draw_cohort(8, 3, clients, 0.1) != first


def test_the_first_cohort_of_seed_zero_stays_what_it_is() -> None:
    assert draw_cohort(0, 1, range(20), 0.25) == [4, 5, 9, 12, 18]


def test_every_client_is_drawn_equally_often() -> None:
    rounds, clients, size = 4000, 20, 5
    seen = Counter(
        p
        for server_round in range(1, rounds + 1)
        for p in draw_cohort(0, server_round, range(clients), 0.25)
    )
    # Each count is binomial (4000, 1/4): standard deviation 27.4. Five of them: a false alarm in 10^5 seeds.
    assert sum(seen.values()) == rounds * size
    assert all(abs(seen[p] - rounds / 4) < 137 for p in range(clients))


@pytest.mark.parametrize(
    ("clients", "fraction"), [([], 0.5), ([1, 2], 0.0), ([1, 2], 1.5), ([1], float("nan"))]
)
def test_nothing_to_draw_from_is_refused(clients: list[int], fraction: float) -> None:
    with pytest.raises(ValueError, match=r"expected clients and a fraction in \(0, 1\]"):
        draw_cohort(0, 1, clients, fraction)


@given(CLIENTS, st.floats(1e-6, 1.0), st.integers(0, 2**40), st.integers(1, 10**6))
def test_coins_draw_a_sorted_part_of_the_clients(
    clients: list[int], rate: float, seed: int, server_round: int
) -> None:
    cohort = draw_poisson_cohort(seed, server_round, clients, rate)
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(clients)
    assert draw_poisson_cohort(seed, server_round, clients, 1.0) == sorted(clients)


def test_coins_are_independent_of_each_other() -> None:
    rounds, clients, rate = 4000, 20, 0.25
    drawn = [draw_poisson_cohort(0, r, range(clients), rate) for r in range(1, rounds + 1)]
    seen = Counter(p for cohort in drawn for p in cohort)
    assert all(abs(seen[p] - rounds * rate) < 137 for p in range(clients))
    sizes = Counter(len(cohort) for cohort in drawn)
    expected = [rounds * binom.pmf(k, clients, rate) for k in range(clients + 1)]
    tested = [k for k, count in enumerate(expected) if count >= 10]
    distance = sum((sizes[k] - expected[k]) ** 2 / expected[k] for k in tested)
    assert distance < chi2.ppf(1 - 1e-5, len(tested)), "sizes are binomial, not fixed"
    both = sum(0 in cohort and 1 in cohort for cohort in drawn)
    assert both == pytest.approx(rounds * rate**2, abs=5 * math.sqrt(rounds * rate**2))


@pytest.mark.parametrize(("clients", "rate"), [([], 0.5), ([1], 0.0), ([1], 1.5), ([1], math.nan)])
def test_no_coins_to_toss_are_refused(clients: list[int], rate: float) -> None:
    with pytest.raises(ValueError, match=r"expected clients and a rate in \(0, 1\]"):
        draw_poisson_cohort(0, 1, clients, rate)
