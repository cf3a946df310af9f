"""The soft prompts that one cohort trains, and the model that computes with them.

The prompts of several clients are rows of one batch of embeddings, so the frozen model needs nothing else to serve
all of them in one pass. Behind a fixed text, its keys and values are computed once and serve every pass.

Axes: b rows of a pass, t tokens of a row, K clients, l soft tokens of a prompt, d width of the embeddings, h width of
the final states.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.soft import (
    FixedCache,
    continued,
    embedding_width,
    fixed_cache,
    soft_inputs,
)
from fedllm_flwr.prompts import PromptSpec
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.decoder import NO_ADAPTERS, LeanDecoder, Tape
from fedllm_flwr.training.full_layers import kept_inputs


class EmbeddingModel(Protocol):
    """A frozen model over embeddings [b, m, d] that are padded on the right."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Final hidden states [b, m, h], without a graph."""

    def backward(self, slope: Tensor) -> Tensor:
        """Gradient [b, m, d] of what the last call of :meth:`forward` got, from that of what it gave."""


class PromptStack:
    """The prompts of K clients; obeys :class:`fedllm_flwr.training.stacks.AdapterStack`.

    A parameter holds the trained segments of one client. States of a reused fixed text are zero: nothing is
    predicted from them, see :func:`check_rows`.

    Args:
        backbone: The shared model.
        spec: Settings of every prompt.
        num_clients: K.
        trained: Segments that are trained; none stands for all.
        fixed_ids: The text that all rows begin with.
        decoder: The lean decoder, or None to compute through transformers.
        reuse: Whether keys and values of the fixed text may be kept; False if something is hooked into the layers.
        checkpointing: As in :func:`fedllm_flwr.training.stacks.make_stack`. Through transformers the fixed text is
            then computed in every pass: a block that is computed again would write its keys twice into a cache.

    Raises:
        ConfigError: A trained segment is unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: PromptSpec,
        num_clients: int,
        trained: Sequence[str] = (),
        *,
        fixed_ids: Sequence[int],
        decoder: LeanDecoder | None,
        reuse: bool,
        checkpointing: bool = False,
    ) -> None:
        reuse = reuse and not (checkpointing and decoder is None)
        cache = fixed_cache(backbone, fixed_ids) if reuse and spec.placement == "after" else None
        self._skipped = cache.length if cache is not None else 0
        self._at = len(fixed_ids) - self._skipped if spec.placement == "after" else 0
        self._model: EmbeddingModel = (
            _WholeModel(backbone, cache)
            if decoder is None
            else _LeanModel(decoder, cache, checkpointing)
        )
        self._checkpoints_layers = checkpointing and decoder is None
        self._backbone = backbone
        self._length, self._width = spec.length, embedding_width(backbone)
        device = backbone.device
        self._mask = torch.from_numpy(spec.trained_rows(trained)).to(device)
        self._loaded = torch.empty(num_clients, self._length, self._width, device=device)
        size = int(self._mask.sum()) * self._width
        self._trained = torch.empty(num_clients, size, device=device)
        self._parameters = [nn.Parameter(row) for row in self._trained]  # share its memory
        self._bound = list(range(num_clients))
        self._places = torch.empty(0)

    def active(self) -> AbstractContextManager[object]:
        """Nothing but how the model keeps its activations is changed."""
        return kept_inputs(self._backbone, self._checkpoints_layers)

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy in."""
        if flat.shape != (self._length * self._width,):
            wanted = f"{self._length} x {self._width} values"
            raise ShapeError(f"flat prompt: expected {wanted}, got shape {flat.shape}")
        values = torch.tensor(flat, dtype=torch.float32).view(self._length, self._width)
        self._loaded[client] = values
        self._trained[client] = self._loaded[client][self._mask].flatten()

    def read(self, client: int) -> np.ndarray:
        """Copy out."""
        flat: np.ndarray = self._prompts([client]).flatten().cpu().numpy()
        return flat

    def parameters(self, client: int) -> list[nn.Parameter]:
        """One flat parameter."""
        return [self._parameters[client]]

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """Choose clients; a prompt has no dropout."""
        self._bound = list(clients)

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Compute with the prompts in place, and give the states of the rows' own tokens."""
        rows, length = input_ids.shape
        with torch.no_grad():
            prompts = self._prompts(self._bound).repeat_interleave(rows // len(self._bound), dim=0)
            own = input_ids[:, self._skipped :]
            inputs = soft_inputs(self._backbone, own, None, prompts, at=self._at, padding="right")
        self._places = inputs.places
        states = inputs.states_of_tokens(self._model.forward(inputs.inputs_embeds))
        unread = states.new_zeros(rows, length - states.shape[1], states.shape[2])
        return torch.cat([unread, states], dim=1)

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """Sum each client's gradient over its rows."""
        own = slope[:, self._skipped :]
        wide = own.new_zeros(len(own), own.shape[1] + self._length, own.shape[2])
        wide.scatter_(1, self._places[..., None].expand_as(own), own)
        found = self._model.backward(wide)[:, self._at : self._at + self._length]
        by_client = found.float().unflatten(0, (len(self._bound), -1)).sum(1)
        gradients = by_client[:, self._mask].flatten(1)
        for client, row in zip(self._bound, gradients, strict=True):
            parameter = self._parameters[client]
            parameter.grad = row if parameter.grad is None else parameter.grad.add_(row)

    def _prompts(self, clients: list[int]) -> Tensor:
        """A copy [K, l, d] of whole prompts."""
        prompts = self._loaded[clients]
        prompts[:, self._mask] = self._trained[clients].unflatten(1, (-1, self._width))
        return prompts


def reused_tokens(
    backbone: Backbone,
    specs: Iterable[object],
    fixed_ids: Sequence[int],
    *,
    plain_layers: bool,
) -> int:
    """Tokens of the fixed text that no pass of prompts behind it has to compute again.

    Args:
        backbone: The shared model.
        specs: What will be trained; without a prompt behind the text nothing is looked at.
        fixed_ids: The text.
        plain_layers: As in :func:`fedllm_flwr.training.stacks.make_stack`.
    """
    asked = any(isinstance(spec, PromptSpec) and spec.placement == "after" for spec in specs)
    cache = fixed_cache(backbone, fixed_ids) if asked and plain_layers else None
    return 0 if cache is None else cache.length


def extra_positions(spec: object, reused: int) -> int:
    """Positions that a row takes in a pass beside one for each of its tokens; negative if it takes fewer.

    Args:
        spec: Settings of the adapter.
        reused: What :func:`reused_tokens` gives.
    """
    if not isinstance(spec, PromptSpec):
        return 0
    return spec.length - (reused if spec.placement == "after" else 0)


def check_rows(spec: object, rows: Sequence[Encoded], fixed_ids: Sequence[int]) -> None:
    """Refuse rows that a prompt behind the fixed text cannot serve; other adapters take any rows.

    Args:
        spec: Settings of the adapter.
        rows: What it will be trained or measured on.
        fixed_ids: The text.

    Raises:
        ShapeError: A row does not begin with the text, or something is predicted before the prompt is read; names
            the row.
    """
    if not isinstance(spec, PromptSpec) or spec.placement != "after":
        return
    text = np.array(fixed_ids, dtype=np.int64)
    for row in rows:
        if not np.array_equal(row.input_ids[: len(text)], text):
            raise ShapeError(
                f"row {row.row_id}: expected it to begin with the {len(text)} tokens of the fixed text, "
                f"behind which the prompt stands, got other tokens"
            )
        if len(row.targets) and row.predict_from[0] < len(text):
            raise ShapeError(
                f"row {row.row_id}: expected its targets to be predicted behind the prompt, "
                f"at position {len(text)} or later, got {row.predict_from[0]}"
            )


class _LeanModel:
    """Forward and backward by the lean decoder."""

    def __init__(self, decoder: LeanDecoder, cache: FixedCache | None, checkpointing: bool) -> None:
        self._decoder = decoder
        self._checkpointing = checkpointing
        self._past = None if cache is None else cache.layers
        self._tape: Tape | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Keep a tape where gradients are wanted."""
        keep = torch.is_grad_enabled()
        with torch.no_grad():
            states, self._tape = self._decoder.forward(
                inputs,
                NO_ADAPTERS,
                keep=keep,
                to_inputs=True,
                past=self._past,
                checkpoints=self._checkpointing,
            )
        return states

    def backward(self, slope: Tensor) -> Tensor:
        """Walk the tape back."""
        assert self._tape is not None  # noqa: S101  # forward comes first
        with torch.no_grad():
            gradient = self._decoder.backward(slope, self._tape, NO_ADAPTERS, {})
        assert gradient is not None  # noqa: S101  # the tape was kept for it
        return gradient


class _WholeModel:
    """Forward through transformers, backward by automatic differentiation."""

    def __init__(self, backbone: Backbone, cache: FixedCache | None) -> None:
        self._backbone = backbone
        self._cache = cache
        self._pass: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Keep the graph where gradients are wanted."""
        inputs = inputs.detach().requires_grad_(torch.is_grad_enabled())
        states = continued(self._backbone, inputs, self._cache)
        self._pass = (inputs, states)
        return states.detach()

    def backward(self, slope: Tensor) -> Tensor:
        """Consume the graph."""
        assert self._pass is not None  # noqa: S101  # forward comes first
        inputs, states = self._pass
        self._pass = None
        [gradient] = torch.autograd.grad(states, inputs, slope)
        return gradient
