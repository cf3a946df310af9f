"""Rows that are computed together with their keys and values.

Axes: b rows of a batch, t tokens, d hidden size, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation_attention import FEW_ROWS, plain_products
from fedllm_flwr.models.generation_start import KeysAndValues, new_cache
from fedllm_flwr.models.heads import full_logits


class CachedRows:
    """One row at first: its keys and values, and which columns of those are padding.

    Args:
        backbone: The model, with what a run has added to it active.
        start: What stands before the row's own tokens.
    """

    def __init__(self, backbone: Backbone, start: KeysAndValues = ()) -> None:
        self._backbone = backbone
        self._cache: DynamicCache = new_cache(backbone, start)
        length = start[0][0].shape[2] if start else 0
        self._mask = torch.ones(1, length, dtype=torch.long, device=backbone.device)

    def read(self, ids: Tensor) -> None:
        """Go on with tokens [b, t] that nothing is predicted from."""
        self.forward(ids, torch.ones_like(ids))

    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Go on with tokens [b, t], padded on the left; float32 logits [b, V] after the last one."""
        states = self.forward(ids, torch.ones_like(ids) if mask is None else mask)
        with _products(len(ids)):
            return next_logits(self._backbone, states[:, -1].contiguous())

    def repeat(self, count: int) -> None:
        """From one row make several equal ones."""
        self.select([0] * count)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, some perhaps several times."""
        if rows == list(range(len(self._mask))):
            return
        chosen = torch.tensor(rows, device=self._mask.device)
        self._mask = self._mask[chosen]
        self._cache.batch_select_indices(chosen)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Go on with tokens [b, t], padding where the mask is 0; final hidden states [b, t, d]."""
        device = self._backbone.device
        before = self._mask.sum(1, keepdim=True)
        own = mask.to(device)
        self._mask = torch.cat([self._mask, own], dim=1)
        positions = (before + own.cumsum(1) - 1).clamp_min(0)
        padded = bool((self._mask == 0).any())
        with _products(ids.numel()):
            output = self._backbone.model.base_model(
                input_ids=ids.to(device),
                attention_mask=self._mask if padded else None,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        states: Tensor = output.last_hidden_state
        return states


def _products(rows: int) -> AbstractContextManager[None]:
    """Float32 products that suit linear layers with so many rows."""
    return plain_products() if rows < FEW_ROWS else nullcontext()


def next_logits(backbone: Backbone, states: Tensor) -> Tensor:
    """The model's logits [b, V] in float32 for final hidden states [b, d].

    The states have to lie one after the other: a cut out of [b, t, d], as the model's own code makes it, lets torch
    read the whole head once for every row.
    """
    transform = backbone.logit_transform
    if transform is None:
        return full_logits(backbone.model, states).float()
    logits: Tensor = backbone.model.get_output_embeddings()(states).float() * transform.scale
    if transform.softcap:
        logits = (logits / transform.softcap).tanh() * transform.softcap
    return logits
