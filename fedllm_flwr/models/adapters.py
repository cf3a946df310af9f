"""PEFT's LoRA layers over the shared backbone, in the model only while they are used.

Axes: P size of a flat adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.averaging import Adapter, LoraFactors
from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.dropout import DropoutSeeds, SeededDropout
from fedllm_flwr.models.layout import AdapterLayout, LoraSpec, Side, initial_factors
from fedllm_flwr.models.shapes import (
    LayerShape,
    check_rank,
    check_targets,
    layer_shape,
    layer_shapes,
)

__all__ = [
    "AdapterLayout",
    "AttachedLora",
    "LayerShape",
    "LoraSpec",
    "Side",
    "attach",
    "check_targets",
    "initial_factors",
    "layer_shapes",
]

_ADAPTER_NAME = "lora"


class AttachedLora:
    """PEFT's LoRA layers of one specification over a shared backbone; in the model only while active.

    Several of them, of any rank, can exist on one backbone; one is active at a time. Get them from :func:`attach`.

    Attributes:
        backbone: The shared model.
        spec: Settings.
        shapes: The adapted layers, sorted by name.
        layout: Order of the flat array, both sides.
    """

    def __init__(self, backbone: Backbone, spec: LoraSpec) -> None:
        targets = backbone.target_layers(spec.target_modules)
        self.backbone = backbone
        self.spec = spec
        self.shapes = tuple(layer_shape(name, layer) for name, layer in targets.items())
        check_rank(self.shapes, spec.rank)
        self.layout = AdapterLayout(self.shapes, spec.rank)
        self._seeds = DropoutSeeds()
        self._layers = _peft_layers(backbone, spec, tuple(targets))
        self._flat = torch.zeros(self.layout.size, dtype=torch.float32, device=backbone.device)
        self._dropouts = [SeededDropout(spec.dropout, name, self._seeds) for name in self._layers]
        for layer, dropout in zip(self._layers.values(), self._dropouts, strict=True):
            layer.lora_dropout[_ADAPTER_NAME] = dropout
        self._parameters = [
            (side, getattr(self._layers[name], f"lora_{side.upper()}")[_ADAPTER_NAME].weight)
            for name, side, _ in self.layout.factors
        ]
        pieces = self._flat.split(self.layout.sizes)
        for (_, parameter), piece in zip(self._parameters, pieces, strict=True):
            parameter.data = piece.view(parameter.shape)

    def load(self, adapter: Adapter) -> None:
        """Copy values into the layers in place.

        Args:
            adapter: Factors of exactly the adapted layers.

        Raises:
            ShapeError: A layer is missing or too many, or a shape differs.
        """
        self.load_flat(self.layout.pack(adapter))

    def load_flat(self, flat: np.ndarray) -> None:
        """Copy values into the layers in place, in one go.

        Args:
            flat: float32 array [P] in the order of ``layout``.

        Raises:
            ShapeError: The array has another size.
        """
        if flat.shape != (self.layout.size,):
            raise ShapeError(f"flat adapter: expected ({self.layout.size},), got {flat.shape}")
        self._flat.copy_(torch.from_numpy(np.require(flat, np.float32, ["C", "W"])))

    def read(self) -> dict[str, LoraFactors]:
        """The values as float32 copies on the CPU."""
        return self.layout.unpack(self.read_flat(), self.spec.scaling)

    def read_flat(self) -> np.ndarray:
        """The values as one float32 copy [P] in the order of ``layout``."""
        return self._flat.to("cpu", copy=True).numpy()

    def parameters(self, side: Side = "both") -> list[nn.Parameter]:
        """The float32 parameters of one or both sides, in the order of :class:`AdapterLayout`."""
        return [parameter for own_side, parameter in self._parameters if side in ("both", own_side)]

    def seed_dropout(self, seed: int) -> None:
        """Set the dropout masks of the next forward pass; needed before each one when training with dropout."""
        self._seeds.values = (seed,)

    @contextmanager
    def active(self, *, train: bool, side: Side = "both") -> Iterator[None]:
        """Put exactly this adapter into the model; afterwards the model is plain again.

        Args:
            train: Whether the parameters get gradients and dropout acts.
            side: Which parameters get gradients.

        Raises:
            RuntimeError: Another adapter is active.
        """
        for own_side, parameter in self._parameters:
            wanted = train and side in ("both", own_side)
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        for dropout in self._dropouts:
            dropout.training = train
        with self.backbone.swapped(self._layers):
            yield


def attach(backbone: Backbone, spec: LoraSpec) -> AttachedLora:
    """PEFT's layers of a specification over a backbone: made at the first call, the same object afterwards.

    Raises:
        ConfigError: The rank is larger than a layer, or a target module names no linear layer.
        RuntimeError: Another adapter is active.
    """
    if spec not in backbone.attached:
        backbone.attached[spec] = AttachedLora(backbone, spec)
    attached: AttachedLora = backbone.attached[spec]
    return attached


def _peft_layers(backbone: Backbone, spec: LoraSpec, names: tuple[str, ...]) -> dict[str, Any]:
    """Let PEFT inject its layers, take them out again, and put the plain layers back."""
    model = backbone.model
    backbone.check_plain(names)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT declares int, computes with any number
        use_rslora=spec.use_rslora,
        target_modules=rf"(?:{'|'.join(name.replace('.', chr(92) + '.') for name in names)})",
        fan_in_fan_out=isinstance(backbone.linear_layers[names[0]], Conv1D),
    )
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # PEFT's own start values, overwritten by load, must not move the generator
            inject_adapter_in_model(config, model, _ADAPTER_NAME)
        layers = {name: model.get_submodule(name) for name in names}
    finally:
        backbone.place({name: backbone.linear_layers[name] for name in names})
        vars(model).pop("peft_config", None)
    for layer in layers.values():
        layer.lora_A.float()
        layer.lora_B.float()
    return layers
