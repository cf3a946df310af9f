import numpy as np
import pytest
import torch

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.reservoir import Reservoir, ReservoirSpec
from fedllm_flwr.reservoir.series import (
    classes_of,
    level_contexts,
    mackey_glass,
    quantile_edges,
    windows,
)


def test_mackey_glass_obeys_its_equation() -> None:
    x = mackey_glass(400, seed=1)
    delayed, now, after = x[:-18], x[17:-1], x[18:]
    change = 0.2 * delayed / (1 + delayed**10) - 0.1 * now
    np.testing.assert_allclose(after - now, change, atol=1e-14)
    assert x.shape == (400,)
    assert x.min() > 0.2
    assert x.max() < 1.5
    assert x.std() > 0.1


def test_mackey_glass_is_chaotic_and_decided_by_its_seed() -> None:
    np.testing.assert_array_equal(mackey_glass(300, seed=1)[:100], mackey_glass(100, seed=1))
    apart = np.abs(mackey_glass(3000, seed=1) - mackey_glass(3000, seed=2))
    assert apart[-500:].mean() > 0.1
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        mackey_glass(0, seed=1)


def test_windows_are_followed_by_their_next_value() -> None:
    contexts, values = windows(np.arange(6.0), 4)
    assert contexts[..., 0].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert contexts.shape == (2, 4, 1)
    assert values.tolist() == [4, 5]
    for series, steps in ((np.arange(4.0), 4), (np.arange(4.0), 0), (np.ones((5, 1)), 2)):
        with pytest.raises(ShapeError, match=f"windows of {steps} steps"):
            windows(series, steps)


def test_quantile_classes_have_equal_sizes() -> None:
    values = np.random.default_rng(0).permutation(100).astype(float)
    edges = quantile_edges(values, 4)
    assert edges.shape == (3,)
    assert np.bincount(classes_of(values, edges)).tolist() == [25, 25, 25, 25]
    assert classes_of(np.array([-1e9, edges[1], 1e9]), edges).tolist() == [0, 2, 3]
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        quantile_edges(values, 1)


def test_persistence_is_hard_to_beat_on_mackey_glass() -> None:
    """The published study reaches 0.47 to 0.53 where the last value alone reaches about 0.87."""
    contexts, values = windows(mackey_glass(3000, seed=0), 30)
    edges = quantile_edges(values, 4)
    found = np.mean(classes_of(contexts[:, -1, 0], edges) == classes_of(values, edges))
    assert found == pytest.approx(0.87, abs=0.03)


def test_level_contexts_are_levels_with_noise() -> None:
    levels = (0.0, 0.25, 0.5)
    contexts, classes = level_contexts(levels, 200, np.random.default_rng(0))
    assert contexts.shape == (600, 16, 1)
    assert np.bincount(classes).tolist() == [200, 200, 200]
    assert contexts.min() == 0
    for level, place in zip(levels[1:], (1, 2), strict=True):
        values = contexts[classes == place]
        # 3,200 draws: 5 standard errors.
        assert values.mean() == pytest.approx(level, abs=0.002)
        assert values.std() == pytest.approx(0.02, abs=0.0013)
    again, _ = level_contexts(levels, 200, np.random.default_rng(0))
    np.testing.assert_array_equal(contexts, again)


def test_levels_can_be_told_apart_by_the_state_alone() -> None:
    """The routing experiment's classes are linearly separable: least squares on z finds all of them."""
    reservoir = Reservoir(ReservoirSpec(size=50, leak=0.6))
    sides = []
    for seed in (0, 1):
        contexts, classes = level_contexts((0.0, 0.25, 0.5), 40, np.random.default_rng(seed))
        sides.append((reservoir.harvest(torch.from_numpy(contexts)).double().numpy(), classes))
    (z, classes), (held_out, wanted) = sides
    weights = np.linalg.solve(z.T @ z + 1e-3 * np.eye(52), z.T @ np.eye(3)[classes])
    assert ((held_out @ weights).argmax(1) == wanted).mean() == 1


@pytest.mark.parametrize(
    ("levels", "per_level", "changes", "message"),
    [
        ((), 3, {}, r"levels in \[0, 1\], got \[\]"),
        ((0.5, 1.5), 3, {}, r"levels in \[0, 1\]"),
        ((0.5,), 0, {}, "got 0, 16 and 0.02"),
        ((0.5,), 1, {"steps": 0}, "got 1, 0 and"),
        ((0.5,), 1, {"noise": -1.0}, "noise >= 0"),
    ],
)
def test_wrong_settings_are_refused(levels, per_level, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        level_contexts(levels, per_level, np.random.default_rng(0), **changes)
