"""What stands before the tokens of every prompt: the keys and values of an adapter's soft prompt, computed once.

Axes: l soft tokens, n tokens of a fixed text, d width of the input embeddings, kv key heads, f size of a head.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.adapters import LoraSpec, attach
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.carried import delta_active
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, module_output
from fedllm_flwr.models.soft import embedding_width
from fedllm_flwr.prompts import PromptSpec

SPARE_COLUMNS = 32
"""Steps after which keys and values are copied into wider arrays."""
KeysAndValues = tuple[tuple[Tensor, Tensor], ...]
"""Of each layer the keys and values [1, kv, length, f]."""


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What a run has added to the frozen model; nothing by default.

    Attributes:
        adapter: Flat float32 values, as in :func:`fedllm_flwr.training.evaluate.evaluate`.
        spec: Settings of the adapter; needed with one.
        delta: A frozen update under the adapter.
        fixed_ids: The text that prompts begin with and behind which a prompt with placement ``after`` stands.

    Raises:
        ConfigError: An adapter without its specification, or the other way round.
    """

    adapter: np.ndarray | None = None
    spec: LoraSpec | PromptSpec | PeftPromptSpec | None = None
    delta: Delta | None = None
    fixed_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.adapter is None) != (self.spec is None):
            given = "values only" if self.spec is None else "a specification only"
            raise ConfigError(f"adaptation: expected an adapter and its settings, got {given}")

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Tokens that every prompt has to begin with, since they stand before the soft prompt."""
        spec = self.spec
        behind = isinstance(spec, PromptSpec) and spec.placement == "after"
        return self.fixed_ids if behind else ()

    @contextmanager
    def active(self, backbone: Backbone) -> Iterator[None]:
        """Let the model compute with the update and the factors; soft prompts are in :func:`start_of` instead.

        Raises:
            ShapeError: Something does not fit the model.
        """
        with ExitStack() as stack:
            stack.enter_context(delta_active(backbone, self.delta or {}))
            if isinstance(self.spec, LoraSpec) and self.adapter is not None:
                attached = attach(backbone, self.spec)
                attached.load_flat(self.adapter)
                stack.enter_context(attached.active(train=False))
            yield


@torch.no_grad()
def start_of(backbone: Backbone, adaptation: Adaptation) -> KeysAndValues:
    """Keys and values of what stands before a prompt's own tokens; empty if nothing does.

    Args:
        backbone: The model, with the adaptation active.
        adaptation: Of it, only a soft prompt or a prefix stands before the tokens.

    Raises:
        ShapeError: The prompt has another size than the model needs.
    """
    spec, flat = adaptation.spec, adaptation.adapter
    if flat is None or not isinstance(spec, PromptSpec | PeftPromptSpec):
        return ()
    if isinstance(spec, PeftPromptSpec):
        rows = module_output(backbone.ref, spec, flat)
        if spec.kind == "prefix_tuning":
            return _prefix(backbone, rows)
    else:
        wanted = spec.length * embedding_width(backbone)
        if flat.shape != (wanted,):
            raise ShapeError(f"soft prompt: expected ({wanted},) values, got {flat.shape}")
        rows = flat.reshape(spec.length, -1)
    soft = torch.from_numpy(np.array(rows, dtype=np.float32)).to(backbone.device, backbone.dtype)
    fixed = torch.tensor(adaptation.leading_ids, dtype=torch.long, device=backbone.device)
    embedded = torch.cat([backbone.model.get_input_embeddings()(fixed), soft])[None]
    cache = new_cache(backbone)
    backbone.model.base_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    return pairs_of(cache)


def new_cache(backbone: Backbone, start: KeysAndValues = ()) -> DynamicCache:
    """A cache of transformers' for one row, with the layers that the model wants.

    Args:
        backbone: The model.
        start: What it holds already; not changed by what is added later.
    """
    cache = DynamicCache(config=backbone.model.config)
    layers: list[Any] = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    for layer, (keys, values) in zip(layers, start, strict=False):
        layer.update(keys, values)
    cache.layers = layers
    return cache


class GrowingLayer(DynamicLayer):
    """Transformers' layer with spare columns: a step writes its own column and copies no other one."""

    _whole: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [b, kv, t, f]; gives all of them."""
        before = self.get_seq_length()
        length = before + key_states.shape[2]
        if self._whole is None or self._whole[0].shape[2] < length:
            wider = [self._wider(new, length) for new in (key_states, value_states)]
            if before:
                held: tuple[Any, Any] = (self.keys, self.values)
                wider[0][:, :, :before], wider[1][:, :, :before] = held
            self._whole = (wider[0], wider[1])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._whole
        keys[:, :, before:length], values[:, :, before:length] = key_states, value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._whole = None

    @staticmethod
    def _wider(new: Tensor, length: int) -> Tensor:
        rows, heads, _, size = new.shape
        return new.new_empty(rows, heads, length + SPARE_COLUMNS, size)


def pairs_of(cache: DynamicCache) -> KeysAndValues:
    """What a cache holds."""
    layers: list[Any] = cache.layers
    return tuple((layer.keys, layer.values) for layer in layers)


def window_of(backbone: Backbone) -> int | None:
    """How many columns of keys the model's shortest attention window sees; None if every layer sees all of them.

    Raises:
        ConfigError: A layer keeps something else than keys and values, such as a recurrent state: rows of different
            lengths cannot be put into one batch.
    """
    cache: Any = new_cache(backbone)
    windows = []
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is not GrowingLayer:
            raise ConfigError(
                f"model {backbone.ref.label}: expected layers that keep keys and values, got {type(layer).__name__}"
            )
    return min(windows, default=None)


def _prefix(backbone: Backbone, rows: np.ndarray) -> KeysAndValues:
    """PEFT's virtual tokens [l, layers * 2 * kv * f] as keys and values."""
    config = backbone.model.config.get_text_config(decoder=True)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    cut = torch.from_numpy(np.array(rows)).to(backbone.device, backbone.dtype)
    pairs = cut.view(len(rows), layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    return tuple((keys[None], values[None]) for keys, values in pairs)
