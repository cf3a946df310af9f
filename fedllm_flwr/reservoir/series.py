"""Numeric contexts with known answers: a chaotic series, constant levels, and what a trivial predictor scores.

Axes: n examples, T steps of a context, K classes.
"""

from collections.abc import Sequence

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.seeding import numpy_generator

DELAY, RISE, DECAY, POWER = 17, 0.2, 0.1, 10
"""Mackey-Glass: delay τ in steps, β, γ and the exponent, for which the series is chaotic."""
DISCARDED = 250
"""First values of a Mackey-Glass series that depend on how it was started."""


def mackey_glass(length: int, seed: int) -> np.ndarray:
    """A Mackey-Glass series, x(t+1) = x(t) + β x(t-τ) / (1 + x(t-τ)^10) - γ x(t).

    Args:
        length: Values, at least 1.
        seed: Draws the τ + 1 values that come before the series, U(1.1, 1.3).

    Returns:
        float64 [length]

    Raises:
        ConfigError: The length is below 1.

    Source:
        Mackey and Glass 1977, Oscillation and chaos in physiological control systems, by Euler steps of length 1.
    """
    if length < 1:
        raise ConfigError(f"Mackey-Glass: expected a length of at least 1, got {length}")
    before = DELAY + 1
    values = np.empty(before + DISCARDED + length)
    values[:before] = numpy_generator(seed, "mackey_glass").uniform(1.1, 1.3, before)
    for now in range(before, values.size):
        # x(t-τ) counts from the value that the step begins at.
        delayed = values[now - 1 - DELAY]
        change = RISE * delayed / (1 + delayed**POWER) - DECAY * values[now - 1]
        values[now] = values[now - 1] + change
    return values[before + DISCARDED :]


def windows(series: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """All contexts of a series and the value that follows each.

    Args:
        series: [length]
        steps: T, in [1, length).

    Returns:
        Contexts [length - T, T, 1], a view, and next values [length - T].

    Raises:
        ShapeError: The series is not flat or has no value after the first context.
    """
    if series.ndim != 1 or not 1 <= steps < series.size:
        raise ShapeError(
            f"windows of {steps} steps: expected a longer flat series, got shape {series.shape}"
        )
    found = np.lib.stride_tricks.sliding_window_view(series[:-1], steps)
    return found[..., None], series[steps:]


def quantile_edges(values: np.ndarray, classes: int) -> np.ndarray:
    """Bounds between classes of equal size.

    Args:
        values: Training values. [n]
        classes: K, at least 2.

    Returns:
        Rising bounds [K - 1].

    Raises:
        ConfigError: There are fewer than two classes.
    """
    if classes < 2:
        raise ConfigError(f"quantile classes: expected at least 2, got {classes}")
    return np.quantile(values, np.arange(1, classes) / classes)


def classes_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The class of each value: how many bounds it reaches; int64 of the values' shape."""
    return np.searchsorted(edges, values, side="right")


def level_contexts(
    levels: Sequence[float],
    per_level: int,
    random: np.random.Generator,
    *,
    steps: int = 16,
    noise: float = 0.02,
) -> tuple[np.ndarray, np.ndarray]:
    """Nearly constant contexts, to be routed to one class for each level.

    Args:
        levels: The classes' levels, in [0, 1].
        per_level: Contexts of each, at least 1.
        random: Draws the noise.
        steps: T, at least 1.
        noise: Standard deviation of every value, which is then clipped to [0, 1]; >= 0.

    Returns:
        Contexts [n, T, 1] and classes [n], int64, level by level.

    Raises:
        ConfigError: A setting is out of range.
    """
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ConfigError(f"level contexts: expected levels in [0, 1], got {list(levels)}")
    if min(per_level, steps) < 1 or not 0 <= noise < float("inf"):
        raise ConfigError(
            f"level contexts: expected at least 1 context and 1 step and noise >= 0, got "
            f"{per_level}, {steps} and {noise}"
        )
    classes = np.repeat(np.arange(len(levels)), per_level)
    centres = np.asarray(levels, dtype=float)[classes]
    drawn = random.normal(centres[:, None, None], noise, (classes.size, steps, 1))
    return np.clip(drawn, 0.0, 1.0), classes
