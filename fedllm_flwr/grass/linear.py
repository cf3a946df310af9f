"""A linear layer that hands out the two factors of its weight gradient instead of multiplying them.

The gradient of W in y = x Wᵀ is G = (dL/dy)ᵀ x. Whoever needs only some rows of G multiplies only these, and what
came of it can be used and freed before the backward pass reaches the next layer.

Axes: N positions of a pass, o outputs, i inputs; for a matrix G = leftᵀ right, left is [N, m] and right [N, n].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Receive = Callable[[Tensor, Tensor], None]
"""Takes dL/dy [N, o] and x [N, i] of a layer; may change the layer's weight in place."""


class HookedLinear(nn.Module):
    """y = x Wᵀ + b, whose weight gradient goes to a receiver as two factors.

    The receiver is called in the backward pass, when the gradient of x is computed already. A layer must be used
    once in a forward pass, because its receiver may change the weight.

    Args:
        weight: W [o, i], of any strides.
        bias: b [o], frozen.
        receive: What takes the factors.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, receive: Receive) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._receive = receive
        # Something of a layer must ask for a gradient, or nothing below the first trained layer's output is recorded
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [..., o] of inputs [..., i]."""
        return _Hooked.apply(inputs, self.weight, self.bias, self._anchor, self._receive)


class _Hooked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        receive: Receive,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.receive = receive
        return linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        d_inputs = slope @ weight if ctx.needs_input_grad[0] else None
        ctx.receive(slope.flatten(0, -2), inputs.flatten(0, -2))
        return d_inputs, None, None, None, None


def row_norms_squared(left: Tensor, right: Tensor) -> Tensor:
    """Squared norms of the rows of leftᵀ right, exactly, by the cheaper of two ways.

    ‖g_j‖² = l_jᵀ (right rightᵀ) l_j with l_j column j of left, which needs N² (m + n) products and no matrix of the
    size of G; with many positions G itself is cheaper, N m n. Sums are float32 or wider.

    Args:
        left: [N, m].
        right: [N, n].

    Returns:
        [m], float32 or wider.
    """
    positions, rows, columns = len(left), left.shape[1], right.shape[1]
    left, right = widen(left), widen(right)
    if positions * (rows + columns) < rows * columns:
        mixed = (right @ right.t()) @ left
        return mixed.mul_(left).sum(0).clamp_(min=0)  # rounding can leave a small negative sum
    return (left.t() @ right).square_().sum(1)


def column_norms_squared(left: Tensor) -> Tensor:
    """Squared norms of the columns of left [N, m], float32 or wider."""
    return widen(left).square().sum(0)


def rows_of_gradient(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Chosen rows of leftᵀ right; the others are never computed.

    Args:
        left: [N, m].
        right: [N, n].
        indices: Which rows, [k].

    Returns:
        [k, n], float32 or wider, multiplied in the factors' dtype.
    """
    return widen(left.index_select(1, indices).t() @ right)


def widen(values: Tensor) -> Tensor:
    """The same values in float32, or as they are if they are float64."""
    return values if values.dtype == torch.float64 else values.float()
