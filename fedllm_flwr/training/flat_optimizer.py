"""An optimizer over one flat array whose state can be put away between two messages and taken up again."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.training.loop import make_optimizer
from fedllm_flwr.training.settings import LocalSettings


class FlatOptimizer:
    """AdamW or SGD over one flat array, with the gradient's norm clipped as in local training.

    Args:
        flat: What is updated in place; it need not require a gradient. [n]
        settings: Optimizer, rate and clip norm.
    """

    def __init__(self, flat: nn.Parameter, settings: LocalSettings) -> None:
        self._flat = flat
        self._clip_norm = settings.clip_norm
        self._optimizer = make_optimizer([flat], settings)

    def step(self, gradient: Tensor) -> None:
        """One step.

        Args:
            gradient: Not changed. [n]
        """
        self._flat.grad = gradient.clone()
        if self._clip_norm:
            nn.utils.clip_grad_norm_([self._flat], self._clip_norm)
        self._optimizer.step()
        self._flat.grad = None

    def state(self) -> dict[str, np.ndarray]:
        """Moments and counts by their names in torch, float32, each at least one-dimensional; empty before a step."""
        held = self._optimizer.state.get(self._flat, {})
        return {
            name: np.atleast_1d(value.detach().cpu().numpy().copy())
            for name, value in held.items()
            if isinstance(value, Tensor)
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what :meth:`state` gave."""
        self._optimizer.state[self._flat] = {
            name: torch.from_numpy(np.array(values)).reshape(
                () if values.size == 1 and name == "step" else values.shape
            )
            for name, values in state.items()
        }
