"""Attention and float32 products for generation, where every step is one query against many keys.

Axes: b rows, h query heads, kv key heads, g query heads of a key head, t queries, T keys, f size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.soft import TOLERANCES

GROUPED = "fedllm_grouped"
PROBE_TOKENS = 6
FEW_ROWS = 16
"""Below so many tokens in a pass, its linear layers are better off with :func:`plain_products`."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention that does not copy the keys for each of the query heads that read them.

    Args:
        module: The layer, as transformers passes it.
        query: [b, h, t, f].
        key: [b, kv, T, f].
        value: [b, kv, T, f].
        attention_mask: Added to the scores, [b or 1, 1, t, T].
        scaling: Factor on the scores.
        **unused: What else transformers passes; a model that needs any of it fails the comparison in
            :func:`generation_kernels` and computes in its own way.

    Returns:
        Mixed values [b, t, h, f], and no weights.
    """
    with plain_products():
        if query.shape[2] == 1:
            return _one_query(query, key, value, attention_mask, scaling), None
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    return mixed.transpose(1, 2).contiguous(), None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    rows, heads, _, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    queries = (query * scaling).view(rows * groups, heads // groups, size)
    scores = torch.bmm(queries, key.reshape(-1, keys, size).transpose(1, 2))
    scores.view(rows, heads, 1, keys).add_(mask)
    mixed = torch.bmm(scores.softmax(-1), value.reshape(-1, keys, size))
    return mixed.view(rows, 1, heads, size)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)


@contextmanager
def generation_kernels(backbone: Backbone) -> Iterator[None]:
    """Compute with :func:`grouped_attention`; the backbone's own attention is back afterwards.

    Args:
        backbone: The model, plain when it is first used: outputs are compared once, and a model whose own attention
            computes otherwise keeps it.
    """
    if backbone not in _GROUPS:
        _GROUPS[backbone] = _computes_the_same(backbone)
    with _attention(backbone, GROUPED) if _GROUPS[backbone] else nullcontext():
        yield


@contextmanager
def plain_products() -> Iterator[None]:
    """Float32 products at "highest" precision, whatever the process has chosen.

    "medium" makes large products faster, but it copies what batched ones multiply, and costs time where there are few
    rows: see ``FEW_ROWS``.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


_GROUPS: "WeakKeyDictionary[Backbone, bool]" = WeakKeyDictionary()


@contextmanager
def _attention(backbone: Backbone, name: str) -> Iterator[None]:
    own = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation(name)
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(own)


@torch.no_grad()
def _computes_the_same(backbone: Backbone) -> bool:
    """Whether two padded rows and one step after them have the states that the model's own attention gives."""
    wanted = _probe(backbone)
    try:
        with _attention(backbone, GROUPED):
            found = _probe(backbone)
    except ValueError:  # the architecture has its own attention only
        return False
    return bool((found - wanted).norm() <= TOLERANCES[backbone.dtype] * wanted.norm())


def _probe(backbone: Backbone) -> Tensor:
    """Final states of the last token of two rows, and of one more after it."""
    last = len(backbone.model.get_input_embeddings().weight) - 1
    ids = torch.linspace(0, last, 2 * PROBE_TOKENS + 2, device=backbone.device).long().view(2, -1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=backbone.model.config)
    found = []
    for columns in (slice(0, PROBE_TOKENS), slice(PROBE_TOKENS, None)):
        output = backbone.model.base_model(
            input_ids=ids[:, columns],
            attention_mask=mask[:, : columns.stop],
            position_ids=positions[:, columns],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.last_hidden_state[:, -1].float())
    return torch.stack(found)
