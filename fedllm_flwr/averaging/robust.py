"""Means of clients' updates that a minority of liars can move only so far.

All clients count alike: a weight that a client states itself would be one more thing to lie about.

Axes: c = clients, n = floats of one update. Everything is computed in float64.
"""

import math
from collections.abc import Callable

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError

COLUMNS = 65_536
"""Coordinates sorted at a time: bounds the scratch beside the updates."""


def norm_bounded_mean(updates: np.ndarray, bound: float) -> np.ndarray:
    """Mean [n] of the updates [c, n], each scaled to a Euclidean norm of at most ``bound``.

    One client moves the result by at most ``bound`` / c.

    Raises:
        ConfigError: The bound is not above 0.
        ShapeError: There is no update, or they are not [c, n].

    Source:
        Sun et al. 2019, Can you really backdoor federated learning?, section 3.2, without its noise.
    """
    checked = _checked(updates)
    if not bound > 0:
        raise ConfigError(f"norm bound: expected > 0, got {bound:g}")
    norms = np.linalg.norm(checked, axis=1)
    factors = np.minimum(1.0, bound / np.where(norms > 0, norms, bound))
    return np.asarray(factors @ checked / len(checked))


def coordinate_median(updates: np.ndarray) -> np.ndarray:
    """Median [n] of each coordinate of the updates [c, n]; with an even c the mean of the two in the middle.

    Raises:
        ShapeError: There is no update, or they are not [c, n].

    Source:
        Yin et al. 2018, Byzantine-robust distributed learning, Definition 1.
    """
    return _by_columns(updates, lambda block: np.median(block, axis=0))


def trimmed_mean(updates: np.ndarray, fraction: float) -> np.ndarray:
    """Mean [n] of each coordinate without its ⌊fraction · c⌋ largest and as many smallest values.

    Raises:
        ConfigError: The fraction is not in [0, 0.5).
        ShapeError: There is no update, or they are not [c, n].

    Source:
        Yin et al. 2018, Definition 2.
    """
    if not 0 <= fraction < 0.5:
        raise ConfigError(f"trimmed mean: expected a fraction in [0, 0.5), got {fraction:g}")
    cut = trimmed_count(fraction, len(updates))

    def trimmed(block: np.ndarray) -> np.ndarray:
        return np.asarray(np.sort(block, axis=0)[cut : len(block) - cut].mean(axis=0))

    return _by_columns(updates, trimmed)


def trimmed_count(fraction: float, num_clients: int) -> int:
    """How many values a trimmed mean leaves out at each end; 0.2 of 5 is 1 although 0.2 · 5 may be below it."""
    return math.floor(fraction * num_clients + 1e-9)


def krum_scores(updates: np.ndarray, num_attackers: int) -> np.ndarray:
    """Sum of squared distances of each update [n] to its c - f - 2 nearest others; [c].

    Args:
        updates: [c, n].
        num_attackers: f, how many may lie.

    Raises:
        ConfigError: Fewer than 2 f + 3 clients: the rule promises nothing.
        ShapeError: There is no update, or they are not [c, n].

    Source:
        Blanchard et al. 2017, Machine learning with adversaries, section 4.
    """
    checked = _checked(updates)
    if num_attackers < 0 or len(checked) < 2 * num_attackers + 3:
        raise ConfigError(
            f"krum: expected at least 2 · attackers + 3 = {2 * num_attackers + 3} updates, got {len(checked)}"
        )
    # Distances are small beside the values that updates share. A mean would be moved by one liar, and its rounding then
    # hide another's distance.
    centred = checked - coordinate_median(checked)
    norms = np.einsum("cn,cn->c", centred, centred)
    distances = np.maximum(norms[:, None] + norms[None, :] - 2 * centred @ centred.T, 0.0)
    np.fill_diagonal(distances, np.inf)
    return np.asarray(np.sort(distances, axis=1)[:, : len(checked) - num_attackers - 2].sum(axis=1))


def krum_chosen(updates: np.ndarray, num_attackers: int, num_chosen: int = 1) -> list[int]:
    """Which updates [c, n] have the lowest scores, ascending by number; equal scores go to the lower number.

    Args:
        updates: [c, n].
        num_attackers: f, how many may lie.
        num_chosen: How many to keep: 1 is Krum, more Multi-Krum; at most c - f.

    Raises:
        ConfigError: There are too few updates for so many attackers or choices.
        ShapeError: There is no update, or they are not [c, n].

    Source:
        Blanchard et al. 2017, sections 4 and 5 (Multi-Krum).
    """
    scores = krum_scores(updates, num_attackers)
    if not 1 <= num_chosen <= len(scores) - num_attackers:
        raise ConfigError(
            f"krum: expected 1 to {len(scores) - num_attackers} updates to choose, got {num_chosen}"
        )
    return sorted(int(i) for i in np.argsort(scores, kind="stable")[:num_chosen])


def _by_columns(updates: np.ndarray, rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a rule of coordinates [c, ·] → [·] to stretches of them."""
    if updates.ndim != 2 or not len(updates):
        raise ShapeError(f"updates: expected [clients, values], got {list(updates.shape)}")
    found = np.empty(updates.shape[1])
    for start in range(0, updates.shape[1], COLUMNS):
        block = updates[:, start : start + COLUMNS].astype(np.float64)
        found[start : start + COLUMNS] = rule(block)
    return found


def _checked(updates: np.ndarray) -> np.ndarray:
    if updates.ndim != 2 or not len(updates):
        raise ShapeError(f"updates: expected [clients, values], got {list(updates.shape)}")
    return np.asarray(updates, np.float64)
