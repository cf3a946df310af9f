import numpy as np
import pytest
from scipy.stats import norm

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.unlearning.distances import (
    different_arrays,
    kolmogorov_smirnov,
    mean_ks_distance,
    null_ks_distances,
    relearning_area,
    utility_change,
)


def test_the_distance_of_shifted_normals_is_what_theory_says():
    """sup |Φ(x) - Φ(x - d)| = 2 Φ(d / 2) - 1."""
    rng = np.random.default_rng(0)
    found = kolmogorov_smirnov(rng.standard_normal(5000), rng.standard_normal(5000) + 1)
    assert found.distance == pytest.approx(2 * norm.cdf(0.5) - 1, abs=0.02)
    assert found.p_value < 1e-9


def test_p_values_of_one_distribution_are_uniform():
    rng = np.random.default_rng(1)
    low = [kolmogorov_smirnov(rng.random(300), rng.random(300)).p_value < 0.1 for _ in range(300)]
    # 10 % and 3 standard errors of 1.7 %
    assert 0.04 < np.mean(low) < 0.16


def test_distances_by_hand():
    found = kolmogorov_smirnov(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6]))
    assert found.distance == 0.5
    same = np.array([1.0, 2.0])
    assert kolmogorov_smirnov(same, same).distance == 0
    assert mean_ks_distance(same, [same, same + 9]) == 0.5
    assert null_ks_distances([same, same, same + 9]) == (0.5, 0.5, 1)


def test_the_relearning_area_is_a_mean_height():
    assert relearning_area([0, 1, 5], [0.0, 1.0, 1.0]) == pytest.approx((0.5 + 4) / 5)
    assert relearning_area([0, 1, 5, 10, 20, 50], [0.3] * 6) == pytest.approx(0.3)
    linear = [0.1 + 0.01 * s for s in (2, 3, 9)]
    assert relearning_area([2, 3, 9], linear) == pytest.approx(0.1 + 0.01 * 5.5)


def test_arrays_are_compared_to_the_byte():
    first = {"a": np.array([0.0, 1.0]), "b": np.ones(2, np.float32), "c": np.array([np.nan])}
    assert different_arrays(first, {name: a.copy() for name, a in first.items()}) == ()
    second = {"a": np.array([-0.0, 1.0]), "b": np.ones(2), "d": np.ones(1)}
    assert different_arrays(first, second) == ("a", "b", "c", "d")
    assert different_arrays({"a": np.ones((1, 2))}, {"a": np.ones((2, 1))}) == ("a",)


def test_utility_by_hand():
    change = utility_change({1: 0.5, 2: 0.9, 3: 0.7}, {1: 0.6, 2: 0.6, 3: 0.7})
    assert change.mean == pytest.approx(-0.2 / 3)
    assert change.worst == pytest.approx(0.1)
    assert (change.largest_loss, change.hardest_hit) == (pytest.approx(-0.3), 2)


def test_bad_input_is_refused():
    with pytest.raises(ShapeError, match=r"2 finite second values \[n\], got shape \[1\]"):
        kolmogorov_smirnov(np.ones(3), np.ones(1))
    with pytest.raises(ShapeError, match="finite first values"):
        kolmogorov_smirnov(np.array([1, np.inf]), np.ones(2))
    with pytest.raises(ConfigError, match="at least one reference"):
        mean_ks_distance(np.ones(2), [])
    with pytest.raises(ConfigError, match="at least 2 references, got 1"):
        null_ks_distances([np.ones(2)])
    with pytest.raises(ShapeError, match="got 2 and 3"):
        relearning_area([0, 1], [1, 2, 3])
    with pytest.raises(ShapeError, match=r"expected rising steps, got \[0, 0\]"):
        relearning_area([0, 0], [1, 2])
    with pytest.raises(ConfigError, match="the same clients before and after, got 1 and 1"):
        utility_change({1: 0.5}, {2: 0.5})
