"""How much of a client's context can be read off what it sends: a linear attack, as a metric.

The attacker has a shadow set of contexts and what they become, which is easy to have: the reservoir is built from a
seed that everybody knows, and the server averages the controller. That only a prompt crosses the wire is not privacy
by itself, and R² near 1 says so.

Axes: n examples, c values of a code (or of a flat prompt), g targets of a context, k width of the code.
"""

from collections.abc import Sequence

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError

RIDGES = tuple(10.0**power for power in range(-12, 3))
"""Penalties that the attacker tries, relative to the largest eigenvalue of the codes' covariance."""


def reconstruction_r2(
    codes: np.ndarray,
    contexts: np.ndarray,
    shadow: np.ndarray,
    *,
    ridges: Sequence[float] = RIDGES,
) -> np.ndarray:
    """Share of each target's variance that a linear decoder of the codes explains, on examples that it never saw.

    The decoder is a ridge regression with an intercept. Its penalty is chosen for each target by leave-one-out on the
    shadow set, so noise on the codes is met by an attacker who allows for it.

    Args:
        codes: What the attacker sees: codes b, flat prompts p, or such with noise. [n, c]
        contexts: What he wants, such as the steps of a series or their mean. [n, g]
        shadow: True for examples on which the decoder is fitted, at least 3; the others, at least 2, test it. [n]
        ridges: Penalties to choose from, >= 0.

    Returns:
        float64 [g]: 1 for a perfect reconstruction, 0 for one no better than the mean of the test examples, and below
        for a worse one; NaN for a target that is the same in all test examples.

    Raises:
        ShapeError: The arrays do not fit each other or hold values that are not finite.
        ConfigError: There are too few examples on one side, or no penalties.

    Source:
        Hoerl and Kennard 1970 (ridge regression); Allen 1974 (PRESS) for the leave-one-out residuals.
    """
    _check(codes, contexts, shadow)
    if not ridges or min(ridges) < 0:
        raise ConfigError(f"reconstruction: expected penalties >= 0, got {list(ridges)}")
    seen = np.asarray(codes[shadow], dtype=np.float64)
    wanted = np.asarray(contexts[shadow], dtype=np.float64)
    mean, middle = seen.mean(0), wanted.mean(0)
    left, sizes, right = np.linalg.svd(seen - mean, full_matrices=False)
    # directions that are rounding alone tell nothing, and would be divided by
    kept = sizes > max(seen.shape) * np.finfo(np.float64).eps * sizes.max(initial=0.0)
    left, sizes, right = left[:, kept], sizes[kept], right[kept]
    shares = left.T @ (wanted - middle)
    weights = _best_weights(left, sizes, shares, wanted - middle, ridges)
    found = middle + (codes[~shadow] - mean) @ right.T @ weights
    held = np.asarray(contexts[~shadow], dtype=np.float64)
    spread = ((held - held.mean(0)) ** 2).sum(0)
    missed = ((held - found) ** 2).sum(0)
    constant = np.ptp(held, axis=0) == 0
    result: np.ndarray = np.where(constant, np.nan, 1 - missed / np.where(constant, 1.0, spread))
    return result


def recovered_codes(prompt_matrix: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The codes behind prompts, b = P⁺ p: exact if P has full rank, which a random one has.

    Args:
        prompt_matrix: P, known to whoever averages it. [m d, k]
        prompts: Flat prompts. [n, m d]

    Returns:
        float64 [n, k].

    Raises:
        ShapeError: The sizes do not fit.
    """
    if prompt_matrix.ndim != 2 or prompts.ndim != 2 or prompts.shape[1] != len(prompt_matrix):
        raise ShapeError(
            f"code recovery: expected P [size, code] and prompts [examples, size], got shapes "
            f"{list(prompt_matrix.shape)} and {list(prompts.shape)}"
        )
    wide = np.asarray(prompts, dtype=np.float64)
    solved, *_ = np.linalg.lstsq(np.asarray(prompt_matrix, dtype=np.float64), wide.T, rcond=None)
    codes: np.ndarray = solved.T
    return codes


def _best_weights(
    left: np.ndarray,
    sizes: np.ndarray,
    shares: np.ndarray,
    wanted: np.ndarray,
    ridges: Sequence[float],
) -> np.ndarray:
    """Weights [rank, g] of the penalty with the least leave-one-out error, target by target."""
    best = np.zeros_like(shares)
    if not sizes.size:
        return best
    least = np.full(wanted.shape[1], np.inf)
    for ridge in ridges:
        shrunk = sizes**2 / (sizes**2 + ridge * sizes[0] ** 2)
        # 1 / n is the intercept's; a leverage of 1 leaves nothing to judge by
        leverage = (left**2) @ shrunk + 1 / len(left)
        apart = np.maximum(1 - leverage, 1e-9)[:, None]
        error = (((wanted - left @ (shrunk[:, None] * shares)) / apart) ** 2).sum(0)
        better = error < least
        least[better] = error[better]
        best[:, better] = ((shrunk / sizes)[:, None] * shares)[:, better]
    return best


def _check(codes: np.ndarray, contexts: np.ndarray, shadow: np.ndarray) -> None:
    if codes.ndim != 2 or contexts.ndim != 2 or shadow.dtype != bool or shadow.ndim != 1:
        raise ShapeError(
            f"reconstruction: expected codes [n, c], contexts [n, g] and booleans [n], got shapes "
            f"{list(codes.shape)}, {list(contexts.shape)} and {shadow.dtype} {list(shadow.shape)}"
        )
    if not len(codes) == len(contexts) == len(shadow):
        counts = f"{len(codes)}, {len(contexts)} and {len(shadow)}"
        raise ShapeError(
            f"reconstruction: expected as many codes as contexts and booleans, got {counts}"
        )
    if not np.isfinite(codes).all() or not np.isfinite(contexts).all():
        raise ShapeError("reconstruction: expected finite codes and contexts, got others")
    fitted = int(shadow.sum())
    if fitted < 3 or len(shadow) - fitted < 2:
        raise ConfigError(
            f"reconstruction: expected at least 3 shadow and 2 test examples, "
            f"got {fitted} and {len(shadow) - fitted}"
        )
