"""GaLore: train a matrix through a low-rank projection of its gradient; for comparison with GRASS.

Axes: W [m, n] with m <= n, r rank, N positions of a pass.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.base import BaseOptimizer, BaseRule
from fedllm_flwr.grass.linear import widen
from fedllm_flwr.grass.selection import check_rank


@dataclass(frozen=True, kw_only=True)
class GaloreSettings:
    """What GaLore does with every matrix.

    Attributes:
        rank: r >= 1.
        refresh_interval: K >= 1: the projection is computed anew before steps 0, K, 2 K, ...; moments are kept.
        scale: α > 0, factor on every step.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Zhao et al. 2024 (GaLore), Algorithm 2.
    """

    rank: int = 64
    refresh_interval: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        for name in ("rank", "refresh_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"GaLore {name}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"GaLore scale: expected a finite number > 0, got {self.scale}")


class GaloreMatrix:
    """One weight matrix in training: W <- W + α P ρ(Pᵀ G), P [m, r] the first left singular vectors of G.

    As in the paper the smaller side of W is projected, and moments outlive a change of P. Weight decay acts on the
    whole matrix. Departures: Pᵀ G is formed from the factors of G without G, and with several micro-batches in a step
    P comes from the gradient of the first one.

    Args:
        weight: W [o, i], changed in place; narrower than float32, each step is rounded.
        settings: How.
        base: The base optimizer's settings.

    Raises:
        ConfigError: The rank is above the smaller side.
    """

    def __init__(self, weight: Tensor, settings: GaloreSettings, base: BaseRule) -> None:
        self._is_wide = weight.shape[0] <= weight.shape[1]
        self._weight = weight if self._is_wide else weight.t()
        self._settings = settings
        self._rule = base
        self._base = BaseOptimizer(base, settings.scale)
        self._gradient: Tensor | None = None
        self._steps = 0
        check_rank(settings.rank, len(self._weight), f"GaLore, matrix of {tuple(weight.shape)}")

    def add(self, slope: Tensor, inputs: Tensor) -> None:
        """Add the projected gradient of a micro-batch; at a refresh, find the projection first."""
        left, right = (slope, inputs) if self._is_wide else (inputs, slope)
        if self._gradient is None and self._steps % self._settings.refresh_interval == 0:
            self._projection = left_singular(left, right, self._settings.rank)
        part = (widen(left) @ self._projection).t() @ widen(right)
        self._gradient = part if self._gradient is None else self._gradient.add_(part)

    def step(self) -> None:
        """Move the weights."""
        assert self._gradient is not None  # noqa: S101  # add comes first
        gradient, self._gradient = self._gradient, None
        values = widen(self._weight)
        if self._rule.penalty:
            gradient.addmm_(self._projection.t(), values, alpha=self._rule.penalty)
        values.mul_(1.0 - self._rule.decay).addmm_(self._projection, self._base.move(gradient))
        if values is not self._weight:
            self._weight.copy_(values)
        self._steps += 1

    def changed(self) -> tuple[np.ndarray, Tensor]:
        """All outputs' weights [o, i]."""
        weight = self._weight if self._is_wide else self._weight.t()
        return np.arange(len(weight)), widen(weight)

    def state_bytes(self) -> int:
        """Bytes of moments and projection."""
        return self._base.state_bytes() + self._projection.nbytes


def left_singular(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of leftᵀ right.

    With fewer positions than rows they come from the factors: leftᵀ = Q R, and the singular vectors of R right, turned
    by Q, are those of the whole. Directions beyond the rank of the gradient carry none of it and are left out as 0.
    The largest entry of each vector is made positive: either sign is right, but moments outlive P and would notice.

    Args:
        left: [N, m].
        right: [N, n].
        rank: r <= m.

    Returns:
        [m, r], float32 or wider, orthonormal but for columns of 0.
    """
    left, right = widen(left), widen(right)
    if len(left) < left.shape[1]:
        turn, inner = torch.linalg.qr(left.t())
        vectors = turn @ torch.linalg.svd(inner @ right, full_matrices=False)[0]
    else:
        vectors = torch.linalg.svd(left.t() @ right, full_matrices=False)[0]
    found = left.new_zeros(left.shape[1], rank)
    kept = min(rank, vectors.shape[1])
    largest = vectors[:, :kept].abs().argmax(0, keepdim=True)
    found[:, :kept] = vectors[:, :kept] * vectors[:, :kept].gather(0, largest).sign()
    return found
