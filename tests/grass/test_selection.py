from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.grass.selection import UNBIASED, RowRule, Rows, choose_rows

RULES: tuple[RowRule, ...] = get_args(RowRule)
PLAIN = [rule for rule in RULES if rule not in UNBIASED]
DRAWS = 10_000


def norms_of(gradient: np.ndarray) -> np.ndarray:
    return (gradient**2).sum(1)


def mean_projected(
    rule: RowRule, rank: int, seed: int, draws: int = DRAWS
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of diag(P Pᵀ) over draws, and its standard error."""
    norms = norms_of(np.random.default_rng(seed).standard_normal((8, 3)))
    generator = np.random.default_rng(seed)
    drawn = np.zeros((draws, len(norms)))
    for line in drawn:
        rows = choose_rows(norms, rank, rule, generator)
        line[rows.indices] = rows.scales.astype(np.float64) ** 2
    return drawn.mean(0), drawn.std(0) / np.sqrt(draws)


@pytest.mark.parametrize("rule", sorted(UNBIASED))
def test_with_replacement_the_projected_gradient_is_right_in_the_mean(rule: RowRule) -> None:
    mean, error = mean_projected(rule, rank=3, seed=5)
    # P Pᵀ is diagonal, so E[P Pᵀ G] = G says that its mean is 1; 8 rows at 4.5 errors: false alarm below 1e-4
    assert (np.abs(mean - 1) < 4.5 * error).all()
    assert (error < 0.05).all()


@pytest.mark.parametrize("rule", ["top_r", "norm_nr", "uniform_nr"])
def test_without_replacement_it_is_not(rule: RowRule) -> None:
    mean, error = mean_projected(rule, rank=3, seed=5, draws=1000)
    assert np.abs(mean - 1).max() > 0.3 + 10 * error.max()


def test_scales_of_a_hand_computed_draw() -> None:
    norms = np.array(
        [0.0, 16.0, 0.0, 0.0]
    )  # only row 1 can be drawn: three times, each with rho² = 1 / 3
    for rule in ("norm_r", "norm2_r"):
        rows = choose_rows(norms, 3, rule, np.random.default_rng(0))
        assert rows.indices.tolist() == [1]
        assert rows.scales == pytest.approx([1.0])
    rows = choose_rows(np.ones(2), 4 // 2, "uniform_r", np.random.default_rng(1))
    assert (rows.scales**2).sum() == pytest.approx(2.0)  # r draws of rho² = m / r


def test_norm_and_norm2_draw_in_proportion() -> None:
    norms = np.array([1.0, 9.0])
    for rule, share in (("norm_nr", 0.75), ("norm2_nr", 0.9)):
        generator = np.random.default_rng(3)
        drawn = [choose_rows(norms, 1, rule, generator).indices[0] for _ in range(2000)]
        assert np.mean(drawn) == pytest.approx(share, abs=0.04)  # 4 standard errors


def test_top_r_takes_the_largest_and_the_lower_of_equals() -> None:
    norms = np.array([1.0, 5.0, 2.0, 5.0, 2.0])
    for rule in ("top_r", "frozen_pass"):
        rows = choose_rows(norms, 3, rule, np.random.default_rng(0))
        assert rows.indices.tolist() == [1, 2, 3]
        assert rows.scales.tolist() == [1, 1, 1]


@given(
    arrays.arrays(
        np.float64, st.integers(1, 12), elements=st.sampled_from([0.0, 1e-30, 0.5, 7.0, 1e30])
    ),
    st.data(),
)
def test_rows_are_distinct_rising_and_as_many_as_asked(
    norms: np.ndarray, data: st.DataObject
) -> None:
    rule = data.draw(st.sampled_from(RULES))
    rank = data.draw(st.integers(1, len(norms)))
    rows = choose_rows(norms, rank, rule, np.random.default_rng(0))
    assert (np.diff(rows.indices) > 0).all()
    assert 0 <= rows.indices[0] <= rows.indices[-1] < len(norms)
    assert (rows.indices.dtype, rows.scales.dtype) == (np.int64, np.float32)
    assert (rows.scales > 0).all()
    if rule in UNBIASED:
        assert len(rows.indices) <= rank
    else:
        assert len(rows.indices) == rank
        assert (rows.scales == 1).all()
    if not rule.startswith("uniform") and rule not in UNBIASED:
        assert (norms[rows.indices] > 0).sum() == min(rank, (norms > 1e-100).sum())


@pytest.mark.parametrize("rule", PLAIN)
def test_as_many_rows_as_there_are_selects_all(rule: RowRule) -> None:
    rows = choose_rows(np.arange(5.0), 5, rule, np.random.default_rng(2))
    assert rows.indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", RULES)
def test_norms_of_zero_are_drawn_alike(rule: RowRule) -> None:
    generator = np.random.default_rng(4)
    drawn = [choose_rows(np.zeros(3), 1, rule, generator).indices[0] for _ in range(300)]
    assert len(set(drawn)) == (1 if rule in ("top_r", "frozen_pass") else 3)


def test_bad_input_is_refused() -> None:
    generator = np.random.default_rng(0)
    for rank in (0, 4):
        with pytest.raises(ConfigError, match=f"rank from 1 to its 3 rows, got {rank}"):
            choose_rows(np.ones(3), rank, "top_r", generator)
    with pytest.raises(ConfigError, match=r"one of top_r, .* got 'best'"):
        choose_rows(np.ones(3), 1, "best", generator)  # type: ignore[arg-type]
    for bad in (np.array([1.0, np.nan]), np.array([1.0, -1.0]), np.ones((2, 2))):
        with pytest.raises(ShapeError, match="vector of finite numbers >= 0"):
            choose_rows(bad, 1, "norm_r", generator)
    with pytest.raises(ShapeError, match="rising"):
        Rows(np.array([2, 2]), np.ones(2, np.float32))
    with pytest.raises(ShapeError, match="as many scales"):
        Rows(np.array([2]), np.ones(2, np.float32))
