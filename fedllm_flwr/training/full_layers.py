"""Other weights in a shared backbone for a while: private copies, hooked layers, checkpoints.

Axes: o outputs and i inputs of a linear layer; for a matrix on a side, m rows of n values.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.grass.linear import HookedLinear, Receive, widen
from fedllm_flwr.grass.optimizer import Side, oriented
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.models.backbone import Backbone

Updates = Mapping[str, RowUpdate]
"""By full layer name."""


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [o, i], a view; transformers' Conv1D stores it as [i, o]."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator,union-attr,assignment]
    return weight.t() if isinstance(layer, Conv1D) else weight


def check_updates(backbone: Backbone, updates: Updates, side: Side) -> None:
    """Refuse updates that the model has no place for.

    Raises:
        ShapeError: A layer is unknown, or an update does not fit it.
    """
    for name, update in updates.items():
        layer = backbone.linear_layers.get(name)
        if layer is None:
            raise ShapeError(f"row update: layer {name} is no linear layer of {backbone.ref.label}")
        rows, columns = oriented(weight_of(layer), side).shape
        update.check((rows, columns), f"layer {name}")


def updated_rows(
    weight: Tensor, update: RowUpdate | None, indices: np.ndarray, side: Side
) -> Tensor:
    """Chosen rows of a weight under an update, rounded to the weight's dtype.

    Args:
        weight: [o, i].
        update: What is added to some rows.
        indices: The rows wanted, [k].
        side: What a row is.

    Returns:
        [k, n].
    """
    found = oriented(weight, side).index_select(0, torch.from_numpy(indices).to(weight.device))
    if update is None or not len(update.indices):
        return found
    _, places, sources = np.intersect1d(
        indices, update.indices, assume_unique=True, return_indices=True
    )
    added = torch.from_numpy(update.values[sources]).to(weight.device)
    wide = widen(found).index_add(0, torch.from_numpy(places).to(weight.device), added)
    return wide.to(weight.dtype)


def private_weight(layer: nn.Module, update: RowUpdate | None, side: Side) -> Tensor:
    """A copy of a layer's weight under an update, [o, i]; the shared one is only read."""
    shared = weight_of(layer)
    private = shared.clone()
    if update is not None:
        places = torch.from_numpy(update.indices).to(private.device)
        rows = updated_rows(shared, update, update.indices, side)
        oriented(private, side).index_copy_(0, places, rows)
    return private


@contextmanager
def updates_active(backbone: Backbone, updates: Updates, side: Side = "out") -> Iterator[None]:
    """Let everything that computes with the backbone see updated weights, for example an evaluation.

    The layers stay in place and only point to copies meanwhile, so the lean decoder sees them too. The shared weights
    are only read. Nothing that was computed inside may be kept for use outside, such as keys and values of a text.

    Args:
        backbone: The shared model.
        updates: By full layer name; may be empty.
        side: What a row is.

    Raises:
        ShapeError: A layer is unknown, or an update does not fit it.
        RuntimeError: Another adapter is active.
    """
    check_updates(backbone, updates, side)
    weights = {
        name: private_weight(backbone.linear_layers[name], update, side)
        for name, update in updates.items()
    }
    with weights_active(backbone, weights):
        yield


@contextmanager
def weights_active(backbone: Backbone, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers point to other weights meanwhile; the shared ones are back afterwards, also after an error.

    Args:
        backbone: The shared model, plain.
        weights: By full layer name, [o, i].

    Raises:
        RuntimeError: Another adapter is active.
    """
    backbone.check_plain(weights)
    layers: dict[str, Any] = {name: backbone.linear_layers[name] for name in weights}
    plain = {name: layer.weight for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            own = weights[name].t() if isinstance(layer, Conv1D) else weights[name]
            layer.weight = nn.Parameter(own, requires_grad=False)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = plain[name]


@contextmanager
def hooked(
    backbone: Backbone, weights: Mapping[str, Tensor], receivers: Mapping[str, Receive]
) -> Iterator[None]:
    """Put hooked layers in the place of plain ones.

    Args:
        backbone: The shared model, plain.
        weights: Of each layer, [o, i].
        receivers: What takes the factors of each layer's gradient.

    Raises:
        RuntimeError: Another adapter is active.
    """
    layers: dict[str, nn.Module] = {}
    for name, weight in weights.items():
        bias: Any = backbone.linear_layers[name].bias
        layers[name] = HookedLinear(weight, bias, receivers[name])
    with backbone.swapped(layers):
        yield


def kept_inputs(backbone: Backbone, wanted: bool) -> AbstractContextManager[None]:
    """:func:`checkpointed` where it is wanted, else nothing."""
    return checkpointed(backbone) if wanted else nullcontext()


@contextmanager
def checkpointed(backbone: Backbone) -> Iterator[None]:
    """Let the blocks of the model keep only their inputs for the way back.

    transformers' own switch acts only on a model in training mode, which would also turn dropout on.

    Raises:
        ConfigError: The model has no blocks that transformers knows how to checkpoint.
    """
    blocks = [
        m for m in backbone.model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if not blocks:
        raise ConfigError(
            f"checkpointing: expected a model with blocks that can be checkpointed, got {backbone.ref.label}"
        )
    try:
        for block in blocks:
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
