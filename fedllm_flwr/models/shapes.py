"""The layers that a LoRA adapter is put on, read from a model's configuration; no weights are loaded for it."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.errors import AssetError, ConfigError
from fedllm_flwr.models.backbone import linear_layers, match_targets
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.kernels import choose
from fedllm_flwr.models.sources import config_file
from fedllm_flwr.models.tiny import tiny_config


@dataclass(frozen=True, order=True)
class LayerShape:
    """A linear layer.

    Attributes:
        name: Its full module name, for example ``model.layers.0.self_attn.q_proj``.
        in_features: Width of its input, i.
        out_features: Width of its output, o.
    """

    name: str
    in_features: int
    out_features: int

    @property
    def width(self) -> int:
        """The smaller of both widths: the largest rank that an update of the layer can have."""
        return min(self.in_features, self.out_features)


def layer_shapes(ref: ModelRef, target_modules: tuple[str, ...]) -> tuple[LayerShape, ...]:
    """The layers that target modules name, sorted by name.

    The model is built on the meta device from its configuration, so this is quick and needs no weights.
    Only a GGUF file whose configuration is not in the catalog has to be converted first, since it holds no
    configuration that can be read apart.

    Args:
        ref: Which model.
        target_modules: As in :meth:`fedllm_flwr.models.backbone.Backbone.target_layers`.

    Returns:
        At least one shape.

    Raises:
        ConfigError: A target module names no linear layer; lists those that there are.
        AssetError: The model is absent.
    """
    shapes = _all_shapes(ref)
    return tuple(shapes[name] for name in match_targets(shapes, target_modules, ref.label))


def check_rank(shapes: tuple[LayerShape, ...], rank: int) -> None:
    """Refuse a rank that is larger than a layer.

    Raises:
        ConfigError: Names the first such layer, its width and the rank.
    """
    for shape in shapes:
        if rank > shape.width:
            raise ConfigError(
                f"LoRA rank {rank} is larger than layer {shape.name}: expected at most its width {shape.width}"
            )


def layer_shape(name: str, layer: Any) -> LayerShape:
    """The shape of one layer, as it says itself: a quantised weight has another one."""
    if isinstance(layer, Conv1D):
        return LayerShape(name, layer.nx, layer.nf)
    return LayerShape(name, layer.in_features, layer.out_features)


@lru_cache(maxsize=8)
def _all_shapes(ref: ModelRef) -> dict[str, LayerShape]:
    config = model_config(ref)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise AssetError(
            f"model {ref.label}: {config.model_type} is not a causal language model"
        ) from error
    return {name: layer_shape(name, layer) for name, layer in linear_layers(model).items()}


def model_config(ref: ModelRef) -> Any:
    """The model's configuration, without its weights.

    Raises:
        AssetError: The model is absent.
    """
    if ref.entry.source == "built":
        return tiny_config()
    if ref.entry.config:
        return AutoConfig.for_model(**ref.entry.config)
    file = config_file(ref) or converted(ref, choose().dtype) / "config.json"
    try:
        return AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(
            f"model {ref.label}: its config.json is not a known configuration: {error}"
        ) from error


def check_targets(
    ref: ModelRef, target_modules: tuple[str, ...], rank: int
) -> tuple[LayerShape, ...]:
    """The layers that target modules name, after checking that a rank fits all of them.

    Raises:
        ConfigError: As :func:`layer_shapes` and :func:`check_rank`.
        AssetError: As :func:`layer_shapes`.
    """
    if not target_modules:
        raise ConfigError("target_modules: expected at least one layer name, got none")
    shapes = layer_shapes(ref, target_modules)
    check_rank(shapes, rank)
    return shapes
