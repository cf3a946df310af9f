"""Local differential privacy: a client clips its update and adds noise before anything leaves it.

The noise comes from the operating system and not from the run's seed, which the server knows. So a run with noise
cannot be repeated to the bit; without it, it can.
"""

from collections.abc import Mapping

import numpy as np

from fedllm_flwr.privacy import ClippedMean
from fedllm_flwr.settings.privacy import LocalPrivacy, PrivacyConfig


def protected(
    privacy: PrivacyConfig, values: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """A client's values as they may leave: its clipped update from the start, with noise.

    Args:
        privacy: The run's; only ``local`` changes anything here.
        values: All that a client is to send of a round, by part, float32 [n].
        start: What it began the round with, as the server knows it.

    Returns:
        float32 [n] by part; the same object where nothing is to be done, and the same bits for an update within the
        clip norm where there is no noise.

    Raises:
        ShapeError: Parts or shapes differ.

    Source:
        The Gaussian mechanism on one contribution, see :func:`fedllm_flwr.privacy.single_release_epsilon` for the ε.
    """
    if not isinstance(privacy, LocalPrivacy):
        return values
    own = ClippedMean(start, privacy.clip_norm)  # of one client
    own.add(values)
    found = own.result(1.0, privacy.noise_multiplier, np.random.default_rng())
    return {name: noised.astype(np.float32) for name, noised in found.items()}
