import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.privacy import clip_and_noise

sizes = st.tuples(st.integers(0, 4), st.integers(1, 5))
rows = hnp.arrays(np.float32, sizes, elements=st.floats(-1e3, 1e3, width=32))


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_by_hand():
    values = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(
        clip_and_noise(values, 1.0, 0.0, draws()), [[0.6, 0.8], [0.3, 0.4], [0, 0]]
    )


@given(rows)
@settings(deadline=None)
def test_no_clip_and_no_noise_change_nothing(values):
    found = clip_and_noise(values, np.inf, 0.0, draws())
    np.testing.assert_array_equal(found, values)
    assert found.dtype == values.dtype
    assert not np.shares_memory(found, values)


@given(rows, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_clipping_bounds_the_norm_and_keeps_the_direction(values, clip_norm):
    wide = values.astype(np.float64)
    found = clip_and_noise(wide, clip_norm, 0.0, draws())
    norms = np.linalg.norm(wide, axis=1)
    clipped = np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(clipped, np.minimum(norms, clip_norm), rtol=1e-9)
    np.testing.assert_allclose(
        found * norms[:, None], wide * clipped[:, None], rtol=1e-6, atol=1e-9
    )


def test_noise_has_the_stated_deviation_is_seeded_and_not_clipped():
    values = np.full((400, 100), 7.0)
    found = clip_and_noise(values, 2.0, 1.5, draws(4))
    noise = found - clip_and_noise(values, 2.0, 0.0, draws())
    # 40,000 draws: the deviation's standard error is 0.0106, the mean's 0.015
    assert noise.std() == pytest.approx(3.0, abs=0.05)
    assert noise.mean() == pytest.approx(0.0, abs=0.075)
    np.testing.assert_array_equal(found, clip_and_noise(values, 2.0, 1.5, draws(4)))
    assert not np.array_equal(found, clip_and_noise(values, 2.0, 1.5, draws(5)))


@pytest.mark.parametrize(
    ("clip_norm", "multiplier"), [(0, 1), (-1, 1), (1, -1), (1, np.inf), (np.nan, 1), (1, np.nan)]
)
def test_settings_out_of_range_are_refused(clip_norm, multiplier):
    with pytest.raises(ConfigError, match="expected clip_norm > 0"):
        clip_and_noise(np.ones((1, 2)), clip_norm, multiplier, draws())


def test_noise_without_a_bound_and_bad_values_are_refused():
    with pytest.raises(ConfigError, match="expected a finite clip_norm where there is noise"):
        clip_and_noise(np.ones((1, 2)), np.inf, 1.0, draws())
    with pytest.raises(ShapeError, match=r"got shape \[2\]"):
        clip_and_noise(np.ones(2), 1.0, 1.0, draws())
    with pytest.raises(ShapeError, match="not finite"):
        clip_and_noise(np.array([[np.nan, 1.0]]), 1.0, 1.0, draws())
