"""The base optimizer: SGD or Adam over whatever the gradient was projected to.

Axes: r x n, the shape of a projected gradient.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fedllm_flwr.errors import ConfigError

BaseName = Literal["sgd", "adamw", "adam8bit"]
FUSED_DEVICES = ("cpu", "cuda")
"""Where torch's optimizers have a kernel that reads and writes each value once."""


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """Settings of a base optimizer.

    Attributes:
        name: ``sgd``, ``adamw``, or ``adam8bit``: AdamW whose moments are held in 8 bits by bitsandbytes, but for
            matrices of fewer than 4,096 values, whose moments that package keeps in float32.
        learning_rate: η, per step, >= 0.
        momentum: Of ``sgd``, in [0, 1).
        beta1: Decay of Adam's first moment, in [0, 1).
        beta2: Decay of Adam's second moment, in [0, 1).
        epsilon: Added to Adam's denominator, > 0.
        weight_decay: λ >= 0: λ/2 ‖w‖² in the loss under ``sgd``; decoupled under Adam.

    Raises:
        ConfigError: A value is out of range, or bitsandbytes is needed and not installed.
    """

    name: BaseName = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        if self.name not in get_args(BaseName):
            known = ", ".join(get_args(BaseName))
            raise ConfigError(f"base optimizer: expected one of {known}, got {self.name!r}")
        for field in ("learning_rate", "weight_decay"):
            value = getattr(self, field)
            _check(field, value, "finite and >= 0", math.isfinite(value) and value >= 0)
        for field in ("momentum", "beta1", "beta2"):
            _check(field, getattr(self, field), "in [0, 1)", 0 <= getattr(self, field) < 1)
        _check("epsilon", self.epsilon, "> 0", self.epsilon > 0)
        if self.name != "sgd":
            _check("momentum", self.momentum, "0 without sgd", self.momentum == 0)
        if self.name == "adam8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "base optimizer adam8bit: expected the package bitsandbytes, which is not installed; use adamw"
            )

    @property
    def penalty(self) -> float:
        """Factor on the weights that is added to the gradient."""
        return self.weight_decay if self.name == "sgd" else 0.0

    @property
    def decay(self) -> float:
        """Share of the weights that a step takes away, apart from the gradient."""
        return 0.0 if self.name == "sgd" else self.learning_rate * self.weight_decay


class BaseOptimizer:
    """The state of one base optimizer; the weights are the caller's, and so is weight decay.

    Args:
        rule: Settings.
        scale: α, factor on every step.
    """

    def __init__(self, rule: BaseRule, scale: float = 1.0) -> None:
        self._rule = rule
        self._rate = rule.learning_rate * scale
        self._moments: list[Tensor] = []
        self._count = torch.zeros(())
        self._eight_bit: Any = None

    def reset(self) -> None:
        """Forget all moments."""
        self._moments = []
        self._eight_bit = None

    def apply(self, values: Tensor, gradient: Tensor) -> None:
        """Add a step, -η α Δ, with Δ the gradient itself (SGD) or what Adam makes of it.

        Args:
            values: Changed in place, [r, n], float32 or wider.
            gradient: Of the same shape and dtype; both are the same in all steps since a reset.
        """
        if self._rule.name == "sgd":
            self._apply_sgd(values, gradient)
        elif self._rule.name == "adamw":
            self._apply_adamw(values, gradient)
        else:
            self._apply_adam8bit(values, gradient)

    def move(self, gradient: Tensor) -> Tensor:
        """The step alone, [r, n]."""
        moved = torch.zeros_like(gradient)
        self.apply(moved, gradient)
        return moved

    def state_bytes(self) -> int:
        """Bytes of the moments that are held."""
        held = list(self._moments)
        if self._eight_bit is not None:
            found = (value for state in self._eight_bit.state.values() for value in state.values())
            held += [value for value in found if isinstance(value, Tensor)]
        return sum(moment.nbytes for moment in held)

    def _apply_sgd(self, values: Tensor, gradient: Tensor) -> None:
        if not self._rule.momentum:
            values.add_(gradient, alpha=-self._rate)
            return
        if not self._moments:
            self._moments = [torch.zeros_like(gradient)]
        [velocity] = self._moments
        values.add_(velocity.mul_(self._rule.momentum).add_(gradient), alpha=-self._rate)

    def _apply_adamw(self, values: Tensor, gradient: Tensor) -> None:
        if not self._moments:
            self._moments = [torch.zeros_like(gradient), torch.zeros_like(gradient)]
            self._count = torch.zeros((), device=gradient.device)
        first, second = self._moments
        # the kernel walks through memory, whatever the strides: a transposed weight would get others' steps
        fits = values.is_contiguous() and gradient.is_contiguous()
        adamw(
            [values],
            [gradient],
            [first],
            [second],
            [],
            [self._count],
            foreach=False,
            fused=fits and gradient.device.type in FUSED_DEVICES,
            amsgrad=False,
            beta1=self._rule.beta1,
            beta2=self._rule.beta2,
            lr=self._rate,
            weight_decay=0.0,
            eps=self._rule.epsilon,
            maximize=False,
        )

    def _apply_adam8bit(self, values: Tensor, gradient: Tensor) -> None:
        """The package moves parameters only; its own is made to point to the values."""
        if (
            not values.is_contiguous()
        ):  # it would move a copy of its own, and the values would never change
            moved = values.contiguous()
            self._apply_adam8bit(moved, gradient)
            values.copy_(moved)
            return
        from bitsandbytes.optim import AdamW8bit  # optional: large, and made for accelerators

        if self._eight_bit is None:
            betas = (self._rule.beta1, self._rule.beta2)
            self._eight_bit = AdamW8bit(
                [nn.Parameter(values)], self._rate, betas, self._rule.epsilon, weight_decay=0.0
            )
        [parameter] = self._eight_bit.param_groups[0]["params"]
        parameter.data, parameter.grad = values, gradient
        self._eight_bit.step()
        parameter.data, parameter.grad = values.new_empty(0), None


class MatrixOptimizer(Protocol):
    """Trains one weight matrix [o, i] in place from the factors of its gradient."""

    def add(self, slope: Tensor, inputs: Tensor) -> None:
        """Take the factors dL/dy [N, o] and x [N, i] of a micro-batch, whose gradient is added to the step's."""

    def step(self) -> None:
        """Update the weights; the gradient is gone afterwards."""

    def changed(self) -> tuple[np.ndarray, Tensor]:
        """Indices of the rows that may have changed, int64 [k], and what they are now, [k, n] float32 or wider."""

    def state_bytes(self) -> int:
        """Bytes that are held from one step to the next, beside the weights."""


def _check(field: str, value: float, expected: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"base optimizer: {field} must be {expected}, got {value!r}")
