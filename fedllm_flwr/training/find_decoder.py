"""Decide whether the lean decoder can stand in for a model: by its parts, then by its outputs."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.decoder import Adapters, LeanDecoder

LOG = logging.getLogger(__name__)
PROBE_TOKENS = 8
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference that rounding explains over all layers. In bfloat16 SmolLM2 differs by 0.02 to
0.05 from its own float32 states, and as much between two orders of summation; a model that computes
something else differs by far more."""
PARTS = {
    "model": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""Names of the children of each part."""
_FOUND: "WeakKeyDictionary[Backbone, LeanDecoder | None]" = WeakKeyDictionary()


def find_decoder(backbone: Backbone) -> LeanDecoder | None:
    """The lean decoder of a backbone, looked for once.

    Args:
        backbone: The shared model, plain.

    Returns:
        None if the model has other parts or computes otherwise, or if it was loaded for a device or a
        length where fused attention is better.
    """
    if backbone not in _FOUND:
        _FOUND[backbone] = _find(backbone)
    return _FOUND[backbone]


def _find(backbone: Backbone) -> LeanDecoder | None:
    if backbone.kernels.attention != "eager" or not _has_known_parts(backbone.model.base_model):
        return None
    decoder = LeanDecoder(backbone)
    last = len(backbone.head_weight()) - 1
    ids = torch.linspace(0, last, 2 * PROBE_TOKENS, device=backbone.device).long()
    ids = ids.view(2, PROBE_TOKENS)
    with torch.no_grad():
        wanted = backbone.hidden(ids).float()
        found = decoder.forward(ids, Adapters({}, 1.0))[0].float()
    if (found - wanted).norm() <= TOLERANCES[backbone.dtype] * wanted.norm():
        return decoder
    LOG.info("model %s has Llama's parts but computes otherwise", backbone.ref.label)
    return None


def _has_known_parts(model: Any) -> bool:
    """Whether the decoder is embedding, Llama blocks and norm, and nothing else.

    What the parts compute is not asked here: the outputs are compared afterwards.
    """
    if _children(model) != PARTS["model"]:
        return False
    return all(_is_known_block(layer) for layer in model.layers)


def _is_known_block(layer: Any) -> bool:
    if _children(layer) != PARTS["layer"]:
        return False
    if _children(layer.self_attn) != PARTS["self_attn"] or _children(layer.mlp) != PARTS["mlp"]:
        return False
    parts = [part for owner in (layer.self_attn, layer.mlp) for part in owner.children()]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        sum(type(part) is nn.Linear for part in parts) == len(parts) - 1  # all but the activation
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and getattr(layer.self_attn, "sliding_window", None) is None
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
