"""Forward and backward passes that hand each trained layer's gradient factors to a receiver.

Axes: b rows of t tokens, d hidden size; o outputs and i inputs of a linear layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fedllm_flwr.grass.linear import Receive
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.batches import Share, collate
from fedllm_flwr.training.decoder import NO_ADAPTERS, Tape
from fedllm_flwr.training.full_decoder import HookedDecoder, hooked_decoder
from fedllm_flwr.training.full_layers import checkpointed, hooked, weights_active


class HookedModel(Protocol):
    """A backbone whose trained layers have weights of their own, and receivers."""

    def active(self) -> AbstractContextManager[object]:
        """The context in which it computes; the backbone is plain and bit-equal afterwards."""

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Final hidden states [b, t, d]."""

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """Call the receivers.

        Args:
            hidden: What the last call of :meth:`hidden` gave.
            slope: The gradient with respect to it.
        """


def hooked_model(
    backbone: Backbone,
    weights: Mapping[str, Tensor],
    receivers: Mapping[str, Receive],
    *,
    checkpointing: bool = False,
) -> HookedModel:
    """The cheaper of two ways: the lean decoder where it knows the model, else transformers.

    Args:
        backbone: The shared model, plain.
        weights: Of the trained layers by full name, [o, i]; receivers may change them in place.
        receivers: What takes the factors of each layer's gradient.
        checkpointing: Keep activations only at the borders of blocks.
    """
    decoder = hooked_decoder(backbone)
    if decoder is not None:
        return LeanModel(backbone, weights, receivers, decoder, checkpointing=checkpointing)
    return GraphModel(backbone, weights, receivers, checkpointing=checkpointing)


class LeanModel:
    """Through the lean decoder.

    Args:
        backbone: As in :func:`hooked_model`.
        weights: As in :func:`hooked_model`.
        receivers: As in :func:`hooked_model`.
        decoder: Over this backbone.
        checkpointing: As in :func:`hooked_model`.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: Mapping[str, Tensor],
        receivers: Mapping[str, Receive],
        decoder: HookedDecoder,
        *,
        checkpointing: bool = False,
    ) -> None:
        self._backbone = backbone
        self._weights = weights
        self._receivers = receivers
        self._decoder = decoder
        self._checkpointing = checkpointing
        self._tape: Tape | None = None

    def active(self) -> AbstractContextManager[object]:
        """The layers point to the weights."""
        return weights_active(self._backbone, self._weights)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Compute, and keep a tape."""
        with torch.no_grad():
            states, self._tape = self._decoder.forward(
                input_ids,
                NO_ADAPTERS,
                keep=True,
                to_inputs=True,
                checkpoints=self._checkpointing,
            )
        return states

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """Walk the tape back."""
        assert self._tape is not None  # noqa: S101  # hidden comes first
        tape, self._tape = self._tape, None
        with torch.no_grad():
            self._decoder.factors(slope, tape, self._receivers)


class GraphModel:
    """Through transformers and automatic differentiation.

    Args:
        backbone: As in :func:`hooked_model`.
        weights: As in :func:`hooked_model`.
        receivers: As in :func:`hooked_model`.
        checkpointing: As in :func:`hooked_model`.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: Mapping[str, Tensor],
        receivers: Mapping[str, Receive],
        *,
        checkpointing: bool = False,
    ) -> None:
        self._backbone = backbone
        self._weights = weights
        self._receivers = receivers
        self._checkpointing = checkpointing

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hooked layers are in the place of the plain ones."""
        with ExitStack() as stack:
            stack.enter_context(hooked(self._backbone, self._weights, self._receivers))
            if self._checkpointing:
                stack.enter_context(checkpointed(self._backbone))
            yield

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Compute, recorded."""
        return self._backbone.hidden(input_ids)

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """Let autograd call the receivers."""
        hidden.backward(slope)


def forward(
    backbone: Backbone, model: HookedModel, share: Share, head_token_ids: tuple[int, ...] | None
) -> tuple[Tensor, Tensor, float]:
    """The forward pass of a micro-batch.

    Args:
        backbone: The shared model.
        model: What computes with it, active.
        share: The rows and their weights.
        head_token_ids: As in :meth:`fedllm_flwr.models.backbone.Backbone.row_losses`.

    Returns:
        Final hidden states, the gradient of the weighted loss with respect to them, and that loss.
    """
    batch = collate([share], backbone.device)
    hidden = model.hidden(batch.input_ids)
    states = hidden.detach().requires_grad_()
    chosen = states.flatten(0, 1).index_select(0, batch.positions)
    loss = (backbone.row_losses(chosen, batch.targets, head_token_ids) * batch.weights).sum()
    [slope] = torch.autograd.grad(loss, states)
    return hidden, slope, float(loss.detach())
