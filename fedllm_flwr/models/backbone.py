"""The frozen language model of a process: loaded once, its weights mapped from disk and shared with other processes.

Axes: b rows of a batch, t tokens, d hidden size, V vocabulary, n chosen positions.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.errors import AssetError, ConfigError
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.convert import quiet_progress_bars, reading_errors
from fedllm_flwr.models.heads import find_transform, full_logits
from fedllm_flwr.models.kernels import EAGER_MAX_TOKENS, Kernels, choose
from fedllm_flwr.models.loss import LogitTransform, frozen_head_losses, frozen_head_scores
from fedllm_flwr.models.quantized import check_package, quantize
from fedllm_flwr.models.tiny import tiny_model, tiny_tokenizer

LOG = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"
"""As a target module: every linear layer except the head."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen causal language model in evaluation mode, split into decoder and head.

    Outside of a ``with`` block that swaps layers, the model is always the plain pretrained one.

    Attributes:
        ref: Which model.
        kernels: How it computes.
        model: The transformers model.
        tokenizer: Its tokenizer.
        logit_transform: What the model does to the product of hidden state and head; None if that is
            unknown, and then losses go through the model's own logits and hold n x V of them in memory.
        linear_layers: Every frozen linear layer except the head, by its full module name, in sorted order.
        attached: Adapters attached so far, by their specification; owned by ``adapters``.
    """

    ref: ModelRef
    kernels: Kernels
    model: Any
    tokenizer: Any
    logit_transform: LogitTransform | None
    linear_layers: dict[str, nn.Module]
    attached: dict[Any, Any] = field(default_factory=dict)
    _head_rows: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _places: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.linear_layers:
            parent, _, attribute = name.rpartition(".")
            self._places[name] = self.model.get_submodule(parent), attribute

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self.kernels.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.kernels.torch_dtype

    @property
    def hidden_size(self) -> int:
        """Width d of the final hidden state."""
        return int(self.head_weight().shape[1])

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Final hidden states, after the last norm and before the head.

        Args:
            input_ids: Token ids [b, t], padded on the right.
            attention_mask: 1 for tokens, 0 for padding, [b, t]; None when there is no padding.

        Returns:
            States [b, t, d] in the model's dtype. No logits and no key-value cache are made.
        """
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
        return output.last_hidden_state

    def head_weight(self, token_ids: tuple[int, ...] | None = None) -> Tensor:
        """Rows of the frozen output embedding.

        Args:
            token_ids: Which tokens; None for the whole vocabulary.

        Returns:
            [len(token_ids), d], kept for the next call, or [V, d] without a copy.
        """
        weight: Tensor = self.model.get_output_embeddings().weight
        if token_ids is None:
            return weight
        if token_ids not in self._head_rows:
            self._head_rows[token_ids] = weight[list(token_ids)].detach().clone()
        return self._head_rows[token_ids]

    def row_losses(
        self, hidden: Tensor, targets: Tensor, token_ids: tuple[int, ...] | None = None
    ) -> Tensor:
        """Cross-entropy of chosen positions, differentiable in their hidden states.

        Args:
            hidden: Final hidden states [n, d].
            targets: The right token [n]: token ids, or indices into token_ids.
            token_ids: Restrict the softmax to these tokens.

        Returns:
            Losses [n] in nats, float32.
        """
        if self.logit_transform is None:
            logits = self._fallback_logits(hidden, token_ids)
            return nn.functional.cross_entropy(logits, targets, reduction="none")
        return frozen_head_losses(
            hidden,
            self.head_weight(token_ids),
            targets,
            bias=self._bias(token_ids),
            transform=self.logit_transform,
        )

    @torch.no_grad()
    def row_scores(
        self, hidden: Tensor, targets: Tensor, token_ids: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and prediction of chosen positions, without gradient.

        Args:
            hidden: Final hidden states [n, d].
            targets: As in :meth:`row_losses`.
            token_ids: As in :meth:`row_losses`.

        Returns:
            Losses [n] in nats, and the most probable token [n]: its id, or its index in token_ids.
        """
        if self.logit_transform is None:
            logits = self._fallback_logits(hidden, token_ids)
            return nn.functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(1)
        return frozen_head_scores(
            hidden,
            self.head_weight(token_ids),
            targets,
            bias=self._bias(token_ids),
            transform=self.logit_transform,
        )

    def target_layers(self, target_modules: tuple[str, ...]) -> dict[str, nn.Module]:
        """The frozen linear layers that target modules name.

        Args:
            target_modules: Last parts of layer names, full layer names, patterns of full names with ``*``, ``?`` and
                ``[…]`` as in file names, or ``("all-linear",)``.

        Returns:
            Layers by full name, sorted.

        Raises:
            ConfigError: A target module names no linear layer; lists those that there are.
        """
        names = match_targets(self.linear_layers, target_modules, self.ref.label)
        return {name: self.linear_layers[name] for name in names}

    @contextmanager
    def swapped(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Put other modules in the place of linear layers; the plain ones are back afterwards, also after an error.

        Raises:
            RuntimeError: A layer is swapped already: adapters are used one at a time.
        """
        self.check_plain(layers)
        try:
            self.place(layers)
            yield
        finally:
            self.place({name: self.linear_layers[name] for name in layers})

    def check_plain(self, names: Iterable[str]) -> None:
        """Refuse to go on while a layer is swapped.

        Raises:
            RuntimeError: Names the layer.
        """
        for name in names:
            parent, attribute = self._places[name]
            if getattr(parent, attribute) is not self.linear_layers[name]:
                raise RuntimeError(f"layer {name}: another adapter is active on this backbone")

    def place(self, layers: Mapping[str, nn.Module]) -> None:
        """Put modules in the place of linear layers, for good; :meth:`swapped` is the safe way."""
        for name, layer in layers.items():
            parent, attribute = self._places[name]
            setattr(parent, attribute, layer)

    def _bias(self, token_ids: tuple[int, ...] | None) -> Tensor | None:
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return bias if bias is None or token_ids is None else bias[list(token_ids)]

    def _fallback_logits(self, hidden: Tensor, token_ids: tuple[int, ...] | None) -> Tensor:
        logits = full_logits(self.model, hidden).float()
        return logits if token_ids is None else logits[:, list(token_ids)]


_LOADED: dict[tuple[ModelRef, Kernels], Backbone] = {}


def load(
    ref: ModelRef,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 1,
    max_tokens: int = EAGER_MAX_TOKENS,
) -> Backbone:
    """Load a model, once per process; further calls that choose the same kernels return the same object.

    Args:
        ref: Which model.
        dtype: As in :func:`fedllm_flwr.models.kernels.choose`.
        device: As in :func:`fedllm_flwr.models.kernels.choose`.
        threads: Threads of one operation. Workers are processes, so 1 is right unless there is only one worker.
        max_tokens: Longest sequence that will be computed; longer ones are right too, only not at their fastest.

    Returns:
        The frozen model. On the CPU its weights are mapped from disk, so that processes share their pages; those
        that are quantised are each process's own.

    Raises:
        ConfigError: The dtype or device is not available, or bitsandbytes is needed and not installed.
        AssetError: The model's source is absent or unreadable.
    """
    check_package(ref.quantization)
    kernels = choose(dtype, device, max_tokens)
    kernels.apply(threads)
    if (ref, kernels) not in _LOADED:
        _LOADED[ref, kernels] = _load(ref, kernels)
    return _LOADED[ref, kernels]


def loaded() -> int:
    """How many models this process holds."""
    return len(_LOADED)


def reset() -> None:
    """Forget every loaded model."""
    _LOADED.clear()


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers of a model that an adapter can be put on: all but the head, by full name, sorted."""
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    return dict(sorted(found.items()))


def match_targets(
    names: Iterable[str], target_modules: tuple[str, ...], model_label: str
) -> tuple[str, ...]:
    """Which layers target modules name.

    Args:
        names: Full names of the linear layers.
        target_modules: As in :meth:`Backbone.target_layers`.
        model_label: The model's name, for the message.

    Returns:
        The matching names in sorted order.

    Raises:
        ConfigError: A target module names no linear layer; lists those that there are.
    """
    names = sorted(names)
    if target_modules == (ALL_LINEAR,):
        return tuple(names)
    chosen: set[str] = set()
    for target in target_modules:
        hits = [
            n for n in names if n == target or n.endswith(f".{target}") or fnmatchcase(n, target)
        ]
        if not hits:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(
                f"target module {target!r} is no linear layer of model {model_label}; it has {known}"
            )
        chosen.update(hits)
    return tuple(sorted(chosen))


def _load(ref: ModelRef, kernels: Kernels) -> Backbone:
    if ref.entry.source == "built":
        model: Any = tiny_model()
        model = model.to(kernels.torch_dtype)
        tokenizer = tiny_tokenizer()
    else:
        folder = converted(ref, kernels.dtype)
        with quiet_progress_bars(), reading_errors(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=kernels.torch_dtype,
                attn_implementation="eager",
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        model.set_attn_implementation(kernels.attention)
    except ValueError:  # some architectures have only one; every one has the plain one
        LOG.warning("model %s: attention %s is not available", ref.label, kernels.attention)
    if ref.quantization != "none":
        quantize(model, linear_layers(model), ref.quantization, kernels.device)
    model = model.to(kernels.device).eval().requires_grad_(False)
    if model.get_output_embeddings() is None:
        raise AssetError(
            f"model {ref.label}: expected a causal language model with an output embedding"
        )
    transform = find_transform(model)
    if transform is None:
        LOG.warning(
            "model %s: unknown output head; losses hold full logits (%d floats per position)",
            ref.label,
            model.get_output_embeddings().weight.shape[0],
        )
    return Backbone(ref, kernels, model, tokenizer, transform, linear_layers(model))
