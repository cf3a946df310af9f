"""Texts that soft prompts stand before or behind, and the keys and values of those behind which they stand.

A text's keys and values do not depend on what follows it, so an exchange that comes back to a text need not compute it
again. Each text is computed alone: its values then have the same bits, whatever came before and whatever is kept.

Axes: B texts, n tokens of the longest, kv key heads, f size of a head.
"""

import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedllm_flwr.models.backbone import Backbone

KEPT_BYTES = 2**31
"""Keys and values that are kept; about 2 MB for 100 tokens of a model of 135 million parameters in bfloat16."""
Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts padded on the right.

    Attributes:
        ids: [B, n], or [1, n] for all rows.
        lengths: Tokens of each.
        layers: Of each layer the keys and values [B, kv, n, f]; none if they are not used.
    """

    ids: Tensor
    lengths: Tensor
    layers: Layers = ()

    def of(self, rows: slice, count: int) -> "Texts":
        """Those of some rows."""
        if len(self.ids) == 1:
            return Texts(self.ids.expand(count, -1), self.lengths.expand(count))
        layers = tuple((keys[rows], values[rows]) for keys, values in self.layers)
        return Texts(self.ids[rows], self.lengths[rows], layers)

    def mask(self) -> Tensor:
        """1 for tokens, 0 for padding, [B, n]."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (columns < self.lengths[:, None]).long()


def padded(text_ids: Sequence[Sequence[int]], device: torch.device) -> Texts:
    """Texts without keys and values.

    Args:
        text_ids: Token ids of each, none empty.
        device: Where the tensors go.
    """
    lengths = torch.tensor([len(text) for text in text_ids], device=device)
    ids = torch.zeros(len(text_ids), int(lengths.max()), dtype=torch.int64, device=device)
    for row, text in zip(ids, text_ids, strict=True):
        row[: len(text)] = torch.tensor(list(text), device=device)
    return Texts(ids, lengths)


class TextKeys:
    """Keys and values of texts, kept within a budget of memory; a text drawn at random makes room for a new one.

    Args:
        backbone: A model that can go on from keys and values alone.
        most_bytes: Room for them.
    """

    def __init__(self, backbone: Backbone, most_bytes: int = KEPT_BYTES) -> None:
        # weak, since it may be the key under which this object is kept
        self._backbone = weakref.proxy(backbone)
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._kept: dict[tuple[int, ...], Layers] = {}
        self._random = random.Random(0)

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self, text_ids: Sequence[Sequence[int]]) -> Texts:
        """Texts with keys and values, which are kept for the next time."""
        texts = padded(text_ids, self._backbone.device)
        longest = texts.ids.shape[1]
        own = [self._layers(tuple(text)) for text in text_ids]
        layers = tuple(
            (
                _stacked([keys for keys, _ in layer], longest),
                _stacked([v for _, v in layer], longest),
            )
            for layer in zip(*own, strict=True)
        )
        return Texts(texts.ids, texts.lengths, layers)

    def _layers(self, text: tuple[int, ...]) -> Layers:
        if text in self._kept:
            return self._kept[text]
        layers = self._computed(text)
        size = _bytes(layers)
        if size <= self._most_bytes:
            while self._held_bytes + size > self._most_bytes:
                gone = self._random.choice(list(self._kept))
                self._held_bytes -= _bytes(self._kept.pop(gone))
            self._kept[text] = layers
            self._held_bytes += size
        return layers

    @torch.no_grad()
    def _computed(self, text: tuple[int, ...]) -> Layers:
        ids = torch.tensor([text], device=self._backbone.device)
        output = self._backbone.model.base_model(input_ids=ids, use_cache=True)
        return tuple((layer.keys[0], layer.values[0]) for layer in output.past_key_values.layers)


_OF: "WeakKeyDictionary[Backbone, TextKeys]" = WeakKeyDictionary()


def keys_of(backbone: Backbone) -> TextKeys:
    """What this process keeps for a model: of all trials and runs that it serves one after the other."""
    if backbone not in _OF:
        _OF[backbone] = TextKeys(backbone)
    return _OF[backbone]


def _bytes(layers: Layers) -> int:
    return sum(part.nbytes for layer in layers for part in layer)


def _stacked(parts: Sequence[Tensor], longest: int) -> Tensor:
    """[kv, n_i, f] of each text to [B, kv, n, f], zeros behind the shorter ones."""
    return torch.stack([pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
