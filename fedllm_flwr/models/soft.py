"""Soft prompts at the level of input embeddings: where they go, what is computed ahead of them, whether they fit.

Everything here holds for any causal language model of transformers that takes embeddings.

Axes: b rows of a batch, t tokens of a row, l soft tokens, d width of the input embeddings, n tokens of a fixed text,
kv key heads, f size of a head.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.shapes import model_config

Padding = Literal["right", "left"]
MAX_FIXED_TEXTS = 8
"""Fixed texts whose keys and values a backbone keeps, the latest used ones: one for each template in use."""
PROBE_TOKENS = 8
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of final states that rounding explains; a model whose cache holds something else than all
keys and values of all tokens differs by far more."""


@dataclass(frozen=True, slots=True, eq=False)
class SoftInputs:
    """What a model of transformers is called with, and where the rows' own tokens are in it.

    Attributes:
        inputs_embeds: [b, l + t, d] in the model's dtype; differentiable in the prompts.
        attention_mask: 1 for tokens and soft tokens, 0 for padding, [b, l + t].
        position_ids: Tokens and soft tokens counted from 0, [b, l + t]; of padding the nearest such number.
        places: Where each of the t columns of the token ids is now, [b, t].
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    places: Tensor

    def states_of_tokens(self, states: Tensor) -> Tensor:
        """The states [b, t, h] of the rows' own tokens among those of all positions [b, l + t, h]."""
        return states.gather(1, self.places[..., None].expand(-1, -1, states.shape[-1]))


def soft_inputs(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompts: Tensor,
    *,
    at: int,
    padding: Padding,
) -> SoftInputs:
    """Put a soft prompt into every row.

    Args:
        backbone: The model.
        input_ids: [b, t].
        attention_mask: 1 for tokens, 0 for padding, [b, t]; None if there is no padding.
        prompts: One prompt for each row, [b, l, d].
        at: Tokens of a row that come before its prompt; padding is no token.
        padding: The side on which rows are padded. On the left it stays ahead of the row and its prompt.

    Raises:
        ShapeError: Sizes do not fit, the padding is on the other side, or a row has fewer tokens than ``at``.
    """
    rows, length = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    _check_mask(mask, (rows, length), at, padding)
    if prompts.ndim != 3 or (len(prompts), prompts.shape[2]) != (rows, embedding_width(backbone)):
        wanted = f"[{rows}, length, {embedding_width(backbone)}]"
        raise ShapeError(f"soft prompts: expected {wanted}, got {list(prompts.shape)}")
    embedded = backbone.model.get_input_embeddings()(input_ids)
    first = (mask == 0).sum(1) if padding == "left" else mask.new_zeros(rows)
    begin = (first + at)[:, None]
    columns = torch.arange(length, device=mask.device)[None]
    places = columns + prompts.shape[1] * (columns >= begin)
    soft = begin + torch.arange(prompts.shape[1], device=mask.device)[None]
    size = (rows, length + prompts.shape[1])
    whole = mask.new_ones(size).scatter(1, places, mask)
    # scatter, since its gradient is a plain gather
    wide = embedded.new_zeros(*size, embedded.shape[2])
    wide = wide.scatter(1, places[..., None].expand_as(embedded), embedded)
    wide = wide.scatter(1, soft[..., None].expand_as(prompts), prompts.to(embedded.dtype))
    return SoftInputs(wide, whole, (whole.cumsum(1) - 1).clamp_min(0), places)


def embedding_width(backbone: Backbone) -> int:
    """Width d of a model's input embeddings, and so of a soft token."""
    return int(backbone.model.get_input_embeddings().weight.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class FixedCache:
    """Keys and values of a text that every row begins with.

    Attributes:
        length: Tokens of the text, n.
        layers: Of each layer the keys and values [kv, n, f], rotated if the model does that.
    """

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def for_rows(self, rows: int) -> DynamicCache:
        """A cache of transformers' for one call with a number of rows; it shares memory with this one."""
        return DynamicCache(
            [
                (keys.expand(rows, *keys.shape), values.expand(rows, *values.shape))
                for keys, values in self.layers
            ]
        )


def fixed_cache(backbone: Backbone, fixed_ids: Sequence[int]) -> FixedCache | None:
    """Keys and values of a fixed text, computed once and kept on the backbone while it is among the latest.

    Args:
        backbone: The model, plain: nothing may be swapped or hooked into its layers.
        fixed_ids: Token ids [n] of the text.

    Returns:
        None if there is no text, or if later tokens need more of it than keys and values, as with a sliding
        window or a recurrent state.
    """
    wanted = tuple(fixed_ids)
    if not wanted or not _can_continue(backbone):
        return None
    kept = _FIXED.setdefault(backbone, OrderedDict())
    if wanted not in kept:
        ids = torch.tensor([wanted], device=backbone.device)
        found = _keys_and_values(backbone, ids)
        assert found is not None  # noqa: S101  # the probe had them
        kept[wanted] = found
        if len(kept) > MAX_FIXED_TEXTS:
            kept.popitem(last=False)
    kept.move_to_end(wanted)
    return kept[wanted]


_FIXED: "WeakKeyDictionary[Backbone, OrderedDict[tuple[int, ...], FixedCache]]" = (
    WeakKeyDictionary()
)
_CONTINUES: "WeakKeyDictionary[Backbone, bool]" = WeakKeyDictionary()


def check_window(ref: ModelRef, prompt_length: int, max_tokens: int) -> None:
    """Refuse a soft prompt that does not fit into the model's context window together with the rows.

    Only the model's configuration is read.

    Args:
        ref: Which model.
        prompt_length: Soft tokens, l.
        max_tokens: Tokens of the longest row.

    Raises:
        ConfigError: Names the window and both lengths.
        AssetError: The model is absent.
    """
    config = model_config(ref).get_text_config(decoder=True)
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and prompt_length + max_tokens > window:
        raise ConfigError(
            f"soft prompt on model {ref.label}: expected at most the {window} positions of its context window, "
            f"got {prompt_length} soft tokens and rows of up to {max_tokens} tokens"
        )


def _check_mask(mask: Tensor, shape: tuple[int, int], at: int, padding: Padding) -> None:
    if mask.shape != shape:
        raise ShapeError(f"attention mask: expected {list(shape)}, got {list(mask.shape)}")
    steps = mask.diff(dim=1) if padding == "right" else -mask.diff(dim=1)
    if bool((steps > 0).any()):
        raise ShapeError(f"attention mask: expected padding on the {padding} only")
    shortest = int(mask.sum(1).min())
    if not 0 <= at <= shortest:
        raise ShapeError(
            f"soft prompt: expected a place from 0 to {shortest}, the tokens of the shortest row, got {at}"
        )


def _can_continue(backbone: Backbone) -> bool:
    """Whether states behind keys and values alone are those of the whole text; tried once."""
    if backbone not in _CONTINUES:
        _CONTINUES[backbone] = _probe(backbone)
    return _CONTINUES[backbone]


@torch.no_grad()
def _probe(backbone: Backbone) -> bool:
    last = len(backbone.model.get_input_embeddings().weight) - 1
    ids = torch.linspace(0, last, 3 * PROBE_TOKENS, device=backbone.device).long()
    text, *rest = ids.view(3, 1, PROBE_TOKENS)
    cache = _keys_and_values(backbone, text)
    if cache is None:
        return False
    whole = torch.cat([torch.cat([text, own], dim=1) for own in rest])
    wanted = backbone.hidden(whole)[:, PROBE_TOKENS:].float()
    embedded = backbone.model.get_input_embeddings()(whole[:, PROBE_TOKENS:])
    found = continued(backbone, embedded, cache).float()
    return bool((found - wanted).norm() <= TOLERANCES[backbone.dtype] * wanted.norm())


def continued(backbone: Backbone, inputs_embeds: Tensor, cache: FixedCache | None) -> Tensor:
    """Final hidden states [b, t, h] of embeddings [b, t, d], padded on the right, that stand behind a fixed text.

    Args:
        backbone: The model.
        inputs_embeds: What follows the text.
        cache: Of the text; None if there is none.
    """
    past = None if cache is None else cache.for_rows(len(inputs_embeds))
    output = backbone.model.base_model(
        inputs_embeds=inputs_embeds, past_key_values=past, use_cache=past is not None
    )
    states: Tensor = output.last_hidden_state
    return states


@torch.no_grad()
def _keys_and_values(backbone: Backbone, ids: Tensor) -> FixedCache | None:
    """Of one text [1, n]; None if the model keeps something else."""
    output = backbone.model.base_model(input_ids=ids, use_cache=True)
    past = getattr(output, "past_key_values", None)
    held: list[Any] = past.layers if isinstance(past, DynamicCache) else []
    if not held or any(type(own) is not DynamicLayer or own.keys is None for own in held):
        return None
    return FixedCache(ids.shape[1], tuple((layer.keys[0], layer.values[0]) for layer in held))
