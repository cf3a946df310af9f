"""Clip each example's values and add Gaussian noise before they leave a client.

Axes: B examples, n values of an example.
"""

import math

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError


def clip_and_noise(
    values: np.ndarray, clip_norm: float, noise_multiplier: float, generator: np.random.Generator
) -> np.ndarray:
    """Scale each row down to a largest norm, then add noise of standard deviation clip_norm · noise_multiplier.

    Args:
        values: Finite; of an example all that it releases at once, such as its flat prompt. [B, n]
        clip_norm: Largest Euclidean norm C of a row, > 0; infinite for no clipping, and then without noise.
        noise_multiplier: σ, >= 0; see :mod:`fedllm_flwr.privacy.accounting` for the ε that it buys.
        generator: Draws the noise. Whoever receives the values must not be able to build it: a seed that the server
            knows, such as the run's, takes the noise off again.

    Returns:
        [B, n] in the dtype of the values, a copy.

    Raises:
        ConfigError: A setting is out of range.
        ShapeError: The values are not [B, n] or not finite.

    Source:
        Abadi et al. 2016 (DP-SGD), Algorithm 1, with rows in place of gradients and without their sum: each row
        stands alone, so its noise hides that row alone (local differential privacy).
    """
    if not clip_norm > 0 or not 0 <= noise_multiplier < math.inf:
        raise ConfigError(
            f"clip and noise: expected clip_norm > 0 and a finite noise_multiplier >= 0, "
            f"got {clip_norm} and {noise_multiplier}"
        )
    if math.isinf(clip_norm) and noise_multiplier:
        raise ConfigError(
            "clip and noise: expected a finite clip_norm where there is noise, got inf"
        )
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ShapeError(
            f"clip and noise: expected finite values [examples, size], got shape {list(values.shape)}"
            f"{'' if np.isfinite(values).all() else ' with values that are not finite'}"
        )
    wide = values.astype(np.float64)
    if math.isfinite(clip_norm):
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        wide *= clip_norm / np.maximum(norms, clip_norm)
    if noise_multiplier:
        wide += clip_norm * noise_multiplier * generator.standard_normal(wide.shape)
    return wide.astype(values.dtype)
