"""A frozen update that every client carries: the part of the model's learning that no longer fits in the adapters.

Axes: n rows, i input features, o output features, R width of a low-rank update.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.averaging import Delta, LowRank
from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.shapes import layer_shape


@contextmanager
def delta_active(backbone: Backbone, delta: Delta) -> Iterator[None]:
    """Add a frozen update to some layers: y = W x + left right x.

    The update is applied by hooks on the plain layers, which every mode calls, so it acts on the plain
    model, under PEFT's layers and in a cohort alike. The weights themselves are not touched: they are
    shared with other processes, and a small update added to a bfloat16 weight would be rounded away.

    Args:
        backbone: The shared model.
        delta: Updates by full layer name; may be empty, and a width R of 0 adds nothing.

    Raises:
        ShapeError: A layer is unknown, or an update does not fit it.
    """
    with ExitStack() as stack:
        for name, update in delta.items():
            layer = backbone.linear_layers.get(name)
            if layer is None:
                raise ShapeError(f"delta: layer {name} is no linear layer of {backbone.ref.label}")
            shape = layer_shape(name, layer)
            if update.shape != (shape.out_features, shape.in_features):
                wanted = (shape.out_features, shape.in_features)
                raise ShapeError(f"delta, layer {name}: expected {wanted}, got {update.shape}")
            if update.rank:
                handle = layer.register_forward_hook(_adder(update, backbone))
                stack.callback(handle.remove)
        yield


def _adder(update: LowRank, backbone: Backbone) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that adds an update in the model's dtype: factored or dense, whichever multiplies less."""
    out_features, in_features = update.shape

    def tensor(values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=backbone.device)

    if update.rank * (out_features + in_features) < out_features * in_features:
        left, right = (
            tensor(update.left).to(backbone.dtype),
            tensor(update.right).to(backbone.dtype),
        )
        return lambda _, inputs, output: output + (inputs[0] @ right.t()) @ left.t()
    full = (tensor(update.left) @ tensor(update.right)).to(backbone.dtype)
    return lambda _, inputs, output: output + inputs[0] @ full.t()
