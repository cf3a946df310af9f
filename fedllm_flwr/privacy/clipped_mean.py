"""The mean of clipped updates with Gaussian noise: what client-level central differential privacy releases.

A contribution is the values of one client by part, such as a flat adapter or a prompt; its update is what they differ
by from the values that the client began with.
"""

import math
from collections.abc import Mapping

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError

Parts = Mapping[str, np.ndarray]


def update_norm(values: Parts, start: Parts) -> float:
    """Euclidean norm of an update over all of its parts together, in float64.

    Args:
        values: What a client has. Flat arrays by part.
        start: What it began with; the same parts and shapes.

    Raises:
        ShapeError: Parts or shapes differ.
    """
    if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in start.items()}:
        raise ShapeError(
            f"update: expected parts {_shapes(start)} as at the start, got {_shapes(values)}"
        )
    return math.hypot(*(float(np.linalg.norm(_step(values, start, name))) for name in start))


def clip_factor(norm: float, clip_norm: float) -> float:
    """What an update is multiplied with so that it is at most ``clip_norm`` long: in (0, 1]."""
    return min(1.0, clip_norm / norm) if norm else 1.0


class ClippedMean:
    """Sum of clipped updates, over a number of clients that is fixed beforehand, with noise.

    Every client that does not answer counts as an update of zero. A client whose update is not clipped counts with
    its values' own bits, so without noise and with as many answers as are expected this is the plain mean.

    Args:
        start: What clients begin with, by part, as they received it. float32 [n]
        clip_norm: Largest norm C of an update, > 0; may be infinite.

    Raises:
        ConfigError: The clip norm is not above 0.

    Source:
        McMahan et al. 2018, Learning differentially private recurrent language models, Algorithm 1 with the fixed
        denominator, flat clipping and weights of 1.
    """

    def __init__(self, start: Parts, clip_norm: float) -> None:
        if not clip_norm > 0:
            raise ConfigError(f"clipped mean: expected clip_norm > 0, got {clip_norm}")
        self._start = dict(start)
        self._clip_norm = clip_norm
        self._sums = {name: np.zeros(values.shape) for name, values in start.items()}
        self.count = 0
        self.below = 0

    def add(self, values: Parts) -> float:
        """Add one client's values, and say how long its update was before clipping.

        Raises:
            ShapeError: Parts or shapes differ from the start's; nothing has been added.
        """
        norm = update_norm(values, self._start)
        factor = clip_factor(norm, self._clip_norm)
        for name, total in self._sums.items():
            if factor == 1.0:
                total += values[name]
            else:
                total += self._start[name]
                total += factor * _step(values, self._start, name)
        self.count += 1
        self.below += norm <= self._clip_norm
        return norm

    def result(
        self, expected_clients: float, noise_multiplier: float, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The start, plus the sum of clipped updates over ``expected_clients``, plus noise.

        Args:
            expected_clients: m > 0, from the settings alone: how many happen to answer is data.
            noise_multiplier: σ >= 0. Each value's noise has standard deviation σ C / m.
            generator: Draws the noise.

        Returns:
            float64 [n] by part.

        Raises:
            ConfigError: A setting is out of range, or there is noise and the clip norm is infinite.
        """
        if not 0 < expected_clients < math.inf or not 0 <= noise_multiplier < math.inf:
            raise ConfigError(
                f"clipped mean: expected finite expected_clients > 0 and noise_multiplier >= 0, got "
                f"{expected_clients} and {noise_multiplier}"
            )
        if noise_multiplier and math.isinf(self._clip_norm):
            raise ConfigError(
                "clipped mean: expected a finite clip_norm where there is noise, got inf"
            )
        missing = expected_clients - self.count
        deviation = noise_multiplier * self._clip_norm / expected_clients if noise_multiplier else 0
        found = {}
        for name, total in self._sums.items():
            whole = total + missing * self._start[name].astype(np.float64) if missing else total
            found[name] = whole / expected_clients
            if deviation:
                found[name] += deviation * generator.standard_normal(total.shape)
        return found


def _step(values: Parts, start: Parts, name: str) -> np.ndarray:
    return np.subtract(values[name], start[name], dtype=np.float64)


def _shapes(parts: Parts) -> dict[str, list[int]]:
    return {name: list(values.shape) for name, values in sorted(parts.items())}
