import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedllm_flwr.averaging import robust
from fedllm_flwr.errors import ConfigError, ShapeError

RNG = np.random.default_rng(7)
RULES = {
    "norm_bound": lambda u: robust.norm_bounded_mean(u, 1.5),
    "median": robust.coordinate_median,
    "trimmed_mean": lambda u: robust.trimmed_mean(u, 0.2),
    "krum": lambda u: u[robust.krum_chosen(u, 1)].mean(axis=0),
    "multi_krum": lambda u: u[robust.krum_chosen(u, 1, 4)].mean(axis=0),
}


def updates(clients: int = 9, values: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clients, values))


# Against Flower's own and scipy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.45])
@pytest.mark.parametrize("clients", [1, 4, 5, 9])
def test_the_trimmed_mean_is_flowers_and_scipys(fraction: float, clients: int) -> None:
    given = updates(clients)
    found = robust.trimmed_mean(given, fraction)
    np.testing.assert_allclose(found, trim_mean(given, fraction), rtol=1e-12)
    np.testing.assert_allclose(found, stats.trim_mean(given, fraction), rtol=1e-12)


@pytest.mark.parametrize(("attackers", "chosen"), [(0, 1), (1, 1), (2, 1), (2, 3), (3, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_krum_chooses_whom_flower_chooses(attackers: int, chosen: int, seed: int) -> None:
    given = updates(9, seed=seed)
    contents = [RecordDict({"arrays": ArrayRecord({"flat": Array(row)})}) for row in given]
    theirs = select_multikrum(contents, attackers, chosen)
    ours = robust.krum_chosen(given, attackers, chosen)
    assert ours == sorted(next(i for i, c in enumerate(contents) if c is t) for t in theirs)


def test_the_median_is_numpys_as_flowers_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "COLUMNS", 7)
    for clients in (1, 2, 5, 8):
        given = updates(clients)
        np.testing.assert_array_equal(robust.coordinate_median(given), np.median(given, axis=0))


# By hand -------------------------------------------------------------------------------------------------------------


def test_three_numbers() -> None:
    given = np.array([[0.0, 3.0], [1.0, 4.0], [100.0, -100.0]])
    np.testing.assert_array_equal(robust.coordinate_median(given), [1, 3])
    np.testing.assert_array_equal(robust.trimmed_mean(given, 0.34), [1, 3])
    np.testing.assert_array_equal(robust.trimmed_mean(given, 0.33), given.mean(axis=0))
    bounded = robust.norm_bounded_mean(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
    np.testing.assert_allclose(bounded, [0.3, 0.4], rtol=1e-15)


def test_krums_score_is_the_distance_to_the_nearest() -> None:
    given = np.array([[0.0], [1.0], [3.0], [7.0], [100.0]])
    # one attacker of five: two nearest others each
    np.testing.assert_allclose(
        robust.krum_scores(given, 1), [1 + 9, 1 + 4, 4 + 9, 16 + 36, 93**2 + 97**2]
    )
    assert robust.krum_chosen(given, 1) == [1]
    assert robust.krum_chosen(given, 1, 3) == [0, 1, 2]


def test_equal_updates_go_to_the_first() -> None:
    assert robust.krum_chosen(np.ones((5, 3)), 1) == [0]


def test_distances_are_exact_where_updates_share_large_values() -> None:
    given = 1e8 + np.array([[0.0], [1.0], [3.0], [7.0], [100.0]])
    assert robust.krum_chosen(given, 1) == [1]


# Properties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 99), clients=st.integers(5, 12))
def test_the_order_of_clients_does_not_matter(rule: str, seed: int, clients: int) -> None:
    drawn = updates(clients, 8, seed)
    order = np.random.default_rng(seed).permutation(clients)
    np.testing.assert_allclose(RULES[rule](drawn[order]), RULES[rule](drawn), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equal_small_updates_are_their_own_result(rule: str) -> None:
    same = np.full((7, 4), 0.25)
    np.testing.assert_allclose(RULES[rule](same), same[0], rtol=1e-15)


def test_a_huge_lie_does_not_hide_a_smaller_one_from_krum() -> None:
    given = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    given[0] = 1e30  # beside which float64 cannot tell 1e10 from nothing
    given[1] += 1e10
    assert robust.krum_chosen(given, 2) != [1]
    assert robust.krum_chosen(given, 2, 5) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum"])
@given(size=st.floats(1, 1e12), seed=st.integers(0, 99))
def test_one_liar_does_not_leave_the_range_of_the_others(rule: str, size: float, seed: int) -> None:
    honest = updates(7, 6, seed)
    lie = size * np.random.default_rng(seed + 1).choice([-1.0, 1.0], 6) * 10
    found = RULES[rule](np.vstack([honest, lie]))
    assert (found >= honest.min(axis=0) - 1e-9).all()
    assert (found <= honest.max(axis=0) + 1e-9).all()


@given(size=st.floats(1, 1e12), bound=st.floats(0.01, 10), seed=st.integers(0, 99))
def test_one_client_moves_a_bounded_mean_by_its_share(size: float, bound: float, seed: int) -> None:
    honest = updates(7, 6, seed)
    lied = honest.copy()
    lied[3] = size
    moved = robust.norm_bounded_mean(lied, bound) - robust.norm_bounded_mean(honest, bound)
    assert np.linalg.norm(moved) <= 2 * bound / 7 + 1e-9


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 3, 4)])
def test_updates_are_a_table(rule: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"updates: expected \[clients, values\]"):
        RULES[rule](np.zeros(shape))


def test_what_a_rule_cannot_promise_is_refused() -> None:
    for fraction in (-0.1, 0.5, float("nan")):
        with pytest.raises(ConfigError, match=r"a fraction in \[0, 0\.5\)"):
            robust.trimmed_mean(updates(), fraction)
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="norm bound: expected > 0"):
            robust.norm_bounded_mean(updates(), bound)
    with pytest.raises(ConfigError, match="2 · attackers \\+ 3 = 9 updates, got 8"):
        robust.krum_scores(updates(8), 3)
    for chosen in (0, 8):
        with pytest.raises(ConfigError, match=f"expected 1 to 7 updates to choose, got {chosen}"):
            robust.krum_chosen(updates(9), 2, chosen)
