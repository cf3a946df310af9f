"""GRASS: train a whole matrix through a few of its rows at a time.

Axes: W [m, n] with m on the projected side, k chosen rows, N positions of a pass.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.grass.base import BaseOptimizer, BaseRule
from fedllm_flwr.grass.linear import (
    column_norms_squared,
    row_norms_squared,
    rows_of_gradient,
    widen,
)
from fedllm_flwr.grass.selection import RowRule, Rows, check_rank, choose_rows

Side = Literal["out", "in"]
"""What a row is: the weights of one output (``out``), or those of one input (``in``), a column of W [o, i]."""


@dataclass(frozen=True, kw_only=True)
class GrassSettings:
    """What GRASS does with every matrix.

    Attributes:
        rank: r, rows trained at a time, >= 1.
        rule: How they are picked.
        refresh_interval: K >= 1: rows are picked anew, and moments reset, before steps 0, K, 2 K, ...
        scale: α > 0, factor on every step.
        side: What a row is.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Muhamed et al. 2024 (GRASS), section 3. Departure: the paper projects the smaller side of each matrix; here
        ``side`` says which, for all matrices alike. With ``out`` the gradient held is r x i.
    """

    rank: int = 64
    rule: RowRule = "norm_nr"
    refresh_interval: int = 200
    scale: float = 1.0
    side: Side = "out"

    def __post_init__(self) -> None:
        for name in ("rank", "refresh_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"GRASS {name}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"GRASS scale: expected a finite number > 0, got {self.scale}")
        for name, kind in (("rule", RowRule), ("side", Side)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"GRASS {name}: expected {known}, got {getattr(self, name)!r}")


def oriented(weight: Tensor, side: Side) -> Tensor:
    """A weight [o, i] as [m, n], a view with the projected side first."""
    return weight if side == "out" else weight.t()


def gradient_norms(slope: Tensor, inputs: Tensor, rule: RowRule, side: Side) -> Tensor | None:
    """The squared norms that a rule reads, from the factors of one gradient.

    Args:
        slope: dL/dy [N, o].
        inputs: x [N, i].
        rule: Which rule.
        side: What a row is.

    Returns:
        [m]: of the gradient's rows; under ``frozen_pass`` of the columns of dL/dy (of x when ``side`` is ``in``); None
        for the uniform rules.
    """
    left, right = (slope, inputs) if side == "out" else (inputs, slope)
    if rule.startswith("uniform"):
        return None
    return column_norms_squared(left) if rule == "frozen_pass" else row_norms_squared(left, right)


class GrassMatrix:
    """One weight matrix in training.

    W[σ] <- W[σ] - η α ρ Δ, where Δ is the base optimizer's step on G_C = ρ G[σ]; all other rows stay bit-equal. With
    several micro-batches in a step, rows are picked by the gradient of the first one, since the others' are not known
    when its rows have to be taken. Weight decay acts on the chosen rows only: under SGD as ρ λ W[σ] in G_C, under
    Adam as W[σ] <- (1 - η λ) W[σ].

    Weights narrower than float32 are computed in float32 and rounded when stored. A step is often smaller than half a
    unit in the last place of bfloat16 and would be lost, so the chosen rows are also held in float32 until the next
    refresh.

    Args:
        weight: W [o, i], changed in place.
        settings: How.
        base: The base optimizer's settings.
        generator: Draws the rows.
        rows: Train these and never pick others, whatever the settings' rank, rule and interval.

    Raises:
        ConfigError: The rank is above the number of rows.
        ShapeError: A given row is not in the matrix.

    Source:
        Muhamed et al. 2024 (GRASS), section 3.
    """

    def __init__(
        self,
        weight: Tensor,
        settings: GrassSettings,
        base: BaseRule,
        generator: np.random.Generator,
        *,
        rows: Rows | None = None,
    ) -> None:
        self._weight = oriented(weight, settings.side)
        self._settings = settings
        self._rule = base
        self._base = BaseOptimizer(base, settings.scale)
        self._generator = generator
        self._is_fixed = rows is not None
        self._touched = np.zeros(len(self._weight), dtype=bool)
        self._gradient: Tensor | None = None
        self._values: Tensor | None = None
        self._steps = 0
        check_rank(settings.rank, len(self._weight), f"GRASS, matrix of {tuple(weight.shape)}")
        if rows is not None:
            if len(rows.indices) and rows.indices[-1] >= len(self._weight):
                found = rows.indices[-1]
                raise ShapeError(f"GRASS: expected rows below {len(self._weight)}, got {found}")
            self._take(rows)

    @property
    def indices(self) -> np.ndarray:
        """The rows that are trained now, int64 [k]."""
        return self._indices.cpu().numpy()

    def add(self, slope: Tensor, inputs: Tensor) -> None:
        """Add the chosen rows of a micro-batch's gradient; at a refresh, choose them first."""
        is_due = not self._is_fixed and self._steps % self._settings.refresh_interval == 0
        if is_due and self._gradient is None:
            self._refresh(slope, inputs)
        left, right = (slope, inputs) if self._settings.side == "out" else (inputs, slope)
        part = rows_of_gradient(left, right, self._indices)
        self._gradient = part if self._gradient is None else self._gradient.add_(part)

    def step(self) -> None:
        """Move the chosen rows."""
        assert self._gradient is not None  # noqa: S101  # add comes first
        gradient, self._gradient = self._gradient, None
        held = self._values
        values = widen(self._weight.index_select(0, self._indices)) if held is None else held
        if self._rule.penalty:
            gradient.add_(values, alpha=self._rule.penalty)
        decay = self._rule.decay
        if self._scales is None:
            if decay:
                values.mul_(1.0 - decay)
            self._base.apply(values, gradient)
        else:
            move = self._base.move(gradient.mul_(self._scales))
            values.mul_(1.0 - decay).add_(move.mul_(self._scales))
        self._weight.index_copy_(0, self._indices, values.to(self._weight.dtype))
        self._steps += 1

    def changed(self) -> tuple[np.ndarray, Tensor]:
        """All rows chosen so far, and their values; those of the current rows are not rounded."""
        found = np.flatnonzero(self._touched)
        values = widen(self._weight[torch.from_numpy(found).to(self._weight.device)])
        if self._values is not None:
            places = torch.from_numpy(np.searchsorted(found, self.indices))
            values.index_copy_(0, places.to(values.device), self._values)
        return found, values

    def state_bytes(self) -> int:
        """Bytes of the moments, and of the chosen rows' indices, scales but for 1, and float32 values if held."""
        held = (self._indices, self._scales, self._values)
        return self._base.state_bytes() + sum(part.nbytes for part in held if part is not None)

    def _refresh(self, slope: Tensor, inputs: Tensor) -> None:
        rule, size = self._settings.rule, len(self._weight)
        found = gradient_norms(slope, inputs, rule, self._settings.side)
        norms = np.ones(size) if found is None else found.double().cpu().numpy()
        self._take(choose_rows(norms, self._settings.rank, rule, self._generator))

    def _take(self, rows: Rows) -> None:
        """Train other rows, with new moments."""
        weight = self._weight
        self._base.reset()
        self._indices = torch.from_numpy(rows.indices).to(weight.device)
        scales = torch.from_numpy(rows.scales[:, None]).to(weight.device)
        self._scales = None if (rows.scales == 1).all() else scales
        self._touched[rows.indices] = True
        self._values = None
        if weight.dtype in (torch.bfloat16, torch.float16):
            self._values = widen(weight.index_select(0, self._indices))
