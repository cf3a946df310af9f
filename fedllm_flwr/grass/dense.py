"""Train a whole matrix, its gradient freed before the next matrix's is formed."""

import numpy as np
from torch import Tensor

from fedllm_flwr.grass.base import BaseOptimizer, BaseRule
from fedllm_flwr.grass.linear import widen


class DenseMatrix:
    """One weight matrix [o, i] in training by the base optimizer itself.

    Args:
        weight: Changed in place; narrower than float32, each step is computed in float32 and rounded.
        base: The base optimizer's settings.
    """

    def __init__(self, weight: Tensor, base: BaseRule) -> None:
        self._weight = weight
        self._rule = base
        self._base = BaseOptimizer(base)
        self._gradient: Tensor | None = None

    def add(self, slope: Tensor, inputs: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        if self._gradient is None:
            self._gradient = widen(slope.t() @ inputs)
        elif slope.dtype == self._gradient.dtype:
            self._gradient.addmm_(slope.t(), inputs)
        else:
            self._gradient.add_(slope.t() @ inputs)

    def step(self) -> None:
        """Move the weights."""
        assert self._gradient is not None  # noqa: S101  # add comes first
        gradient, self._gradient = self._gradient, None
        values = widen(self._weight)
        if self._rule.penalty:
            gradient.add_(values, alpha=self._rule.penalty)
        if self._rule.decay:
            values.mul_(1.0 - self._rule.decay)
        self._base.apply(values, gradient)
        if values is not self._weight:
            self._weight.copy_(values)

    def changed(self) -> tuple[np.ndarray, Tensor]:
        """All rows."""
        return np.arange(len(self._weight)), widen(self._weight)

    def state_bytes(self) -> int:
        """Bytes of the moments."""
        return self._base.state_bytes()
