"""The adapters that one cohort trains, and the model that computes with them.

There is one training loop for all of them. LoRA has three ways: the lean decoder, for one client or several, where
it knows the model; else PEFT's layers for one client, and stacked factors for several. Soft prompts are in
`prompt_stacks`, PEFT's own prompt methods in `peft_prompt_stacks`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapters import AttachedLora, LoraSpec, attach
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cohort import CohortLora
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.prompts import PromptSpec
from fedllm_flwr.training.decoder import NO_ADAPTERS, Adapters, LeanDecoder, Tape
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.flat import FlatFactors
from fedllm_flwr.training.frozen_states import entering_states
from fedllm_flwr.training.full_layers import kept_inputs
from fedllm_flwr.training.peft_prompt_stacks import PeftPromptStack
from fedllm_flwr.training.prompt_stacks import PromptStack
from fedllm_flwr.training.settings import Side

AdapterSpec = LoraSpec | PromptSpec | PeftPromptSpec
"""Settings of whatever can be trained over the frozen backbone."""


class AdapterStack(Protocol):
    """The adapters of the clients 0 to K - 1 of a cohort."""

    def active(self) -> AbstractContextManager[object]:
        """The context in which :meth:`hidden` is called."""

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy a client's flat adapter in place; raises ShapeError if its size is wrong."""

    def read(self, client: int) -> np.ndarray:
        """A copy of a client's flat adapter."""

    def parameters(self, client: int) -> list[nn.Parameter]:
        """What is trained of a client."""

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """Say which clients the next pass serves, and the seeds of their dropout masks."""

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Final hidden states [b, t, d].

        Args:
            input_ids: The rows of each bound client, which lie together, padded on the right. [b, t]
            lengths: Tokens of each row; with them a stack may keep what of a row never changes. States of padding
                are then others.
        """

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """Add the bound clients' gradients to their parameters.

        Args:
            hidden: What the last call of :meth:`hidden` gave.
            slope: The gradient of a sum of the clients' losses with respect to it.
        """


def make_stack(
    backbone: Backbone,
    spec: AdapterSpec,
    num_clients: int,
    side: Side,
    *,
    plain_layers: bool = True,
    trained: Sequence[str] = (),
    fixed_ids: Sequence[int] = (),
    checkpointing: bool = False,
) -> AdapterStack:
    """The cheapest stack that can compute what is asked for.

    Args:
        backbone: The shared model.
        spec: Settings of every adapter.
        num_clients: K; 1 where :func:`trains_alone` holds.
        side: The factors that are trained; of a prompt, which has no factors, ``both``.
        plain_layers: Whether the frozen layers are as pretrained; False if something was hooked into
            them, such as a delta, which only transformers' own modules call.
        trained: Segments of a prompt that are trained; none stands for all.
        fixed_ids: The text that all rows begin with; only a prompt behind it makes use of it.
        checkpointing: Keep activations only at the borders of blocks, and compute the rest again on the way back.

    Raises:
        ConfigError: The adapter has no such side or segment, or does not fit the model, or the model has no blocks
            that can be checkpointed.
    """
    if not isinstance(spec, LoraSpec) and side != "both":
        raise ConfigError(f"soft prompt: expected side both, since it has none, got {side}")
    if not isinstance(spec, PromptSpec) and trained:
        kind = type(spec).__name__
        raise ConfigError(f"{kind}: expected no segments to train, got {list(trained)}")
    if isinstance(spec, PeftPromptSpec):
        return PeftPromptStack(backbone, spec, checkpointing=checkpointing)
    decoder = find_decoder(backbone) if plain_layers and not spec.dropout else None
    if isinstance(spec, PromptSpec):
        return PromptStack(
            backbone,
            spec,
            num_clients,
            trained,
            fixed_ids=fixed_ids,
            decoder=decoder,
            reuse=plain_layers,
            checkpointing=checkpointing,
        )
    if decoder is not None:
        return LeanStack(
            backbone, spec, num_clients, side, decoder=decoder, checkpointing=checkpointing
        )
    if num_clients == 1:
        return SingleStack(attach(backbone, spec), side, checkpointing=checkpointing)
    cohort = CohortLora(backbone, spec, num_clients, side=side)
    return CohortStack(cohort, checkpointing=checkpointing)


def trains_alone(spec: AdapterSpec) -> bool:
    """Whether a client with such an adapter never shares a pass with another."""
    return bool(spec.dropout) or (isinstance(spec, PeftPromptSpec) and spec.alone)


def plain_hidden(
    backbone: Backbone, *, plain_layers: bool = True
) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """What computes final hidden states without any adapter, and without gradient, from ids and rows' lengths.

    Args:
        backbone: The shared model.
        plain_layers: As in :func:`make_stack`.
    """
    decoder = find_decoder(backbone) if plain_layers else None
    if decoder is None:
        return lambda input_ids, lengths: backbone.hidden(input_ids)
    return lambda input_ids, lengths: decoder.forward(input_ids, NO_ADAPTERS)[0]


class LeanStack:
    """Flat parameters, computed with by the lean decoder."""

    def __init__(
        self,
        backbone: Backbone,
        spec: LoraSpec,
        num_clients: int,
        side: Side,
        *,
        decoder: LeanDecoder,
        checkpointing: bool = False,
    ) -> None:
        self._decoder = decoder
        self._checkpointing = checkpointing
        self._flat = FlatFactors(backbone, spec, side)
        self._lowest = decoder.lowest(backbone.target_layers(spec.target_modules))
        device = backbone.device
        self._trained = torch.empty(num_clients, self._flat.trained_size, device=device)
        self._frozen = torch.empty(num_clients, self._flat.frozen_size, device=device)
        self._parameters = [nn.Parameter(row) for row in self._trained]  # share its memory
        self._bound = list(range(num_clients))
        self._pass: tuple[Adapters, Tape] | None = None

    def active(self) -> AbstractContextManager[object]:
        """Nothing is changed in the model."""
        return nullcontext()

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy in."""
        trained, frozen = self._flat.split(flat)
        self._trained[client] = torch.from_numpy(np.require(trained, requirements="W"))
        self._frozen[client] = torch.from_numpy(np.require(frozen, requirements="W"))

    def read(self, client: int) -> np.ndarray:
        """Copy out."""
        trained, frozen = self._trained[client], self._frozen[client]
        return self._flat.join(trained.cpu().numpy(), frozen.cpu().numpy())

    def parameters(self, client: int) -> list[nn.Parameter]:
        """One flat parameter."""
        return [self._parameters[client]]

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """Choose rows; there is no dropout here."""
        self._bound = list(clients)

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Compute from the first adapted block on, and keep a tape where gradients are wanted."""
        everyone = self._bound == list(range(len(self._trained)))
        chosen = slice(None) if everyone else self._bound
        factors = self._flat.factors(self._trained[chosen], self._frozen[chosen])
        adapters = Adapters(factors, self._flat.scaling)
        keep = torch.is_grad_enabled()
        with torch.no_grad():
            inputs, first = entering_states(self._decoder, input_ids, lengths, self._lowest)
            states, tape = self._decoder.forward(
                inputs, adapters, keep=keep, first=first, checkpoints=self._checkpointing
            )
        self._pass = (adapters, tape)
        return states

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """Walk the tape back and hand each client its own row."""
        assert self._pass is not None  # noqa: S101  # hidden comes first
        adapters, tape = self._pass
        shape = (len(self._bound), self._flat.trained_size)
        gradient = torch.empty(shape, device=slope.device)
        with torch.no_grad():
            self._decoder.backward(slope, tape, adapters, self._flat.slopes(gradient))
        for client, row in zip(self._bound, gradient, strict=True):
            parameter = self._parameters[client]
            parameter.grad = row if parameter.grad is None else parameter.grad.add_(row)


class SingleStack:
    """One client in PEFT's layers."""

    def __init__(self, attached: AttachedLora, side: Side, *, checkpointing: bool = False) -> None:
        self._attached = attached
        self._side: Side = side
        self._checkpointing = checkpointing

    @contextmanager
    def active(self) -> Iterator[None]:
        """PEFT's layers are in the model."""
        with (
            self._attached.active(train=True, side=self._side),
            kept_inputs(self._attached.backbone, self._checkpointing),
        ):
            yield

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy in."""
        self._attached.load_flat(flat)

    def read(self, client: int) -> np.ndarray:
        """Copy out."""
        return self._attached.read_flat()

    def parameters(self, client: int) -> list[nn.Parameter]:
        """One or two parameters a layer."""
        return self._attached.parameters(self._side)

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """Seed the masks."""
        self._attached.seed_dropout(dropout_seeds[0])

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Through transformers."""
        return self._attached.backbone.hidden(input_ids)

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """By automatic differentiation."""
        hidden.backward(slope)


class CohortStack:
    """Several clients in stacked layers."""

    def __init__(self, cohort: CohortLora, *, checkpointing: bool = False) -> None:
        self._cohort = cohort
        self._checkpointing = checkpointing

    @contextmanager
    def active(self) -> Iterator[None]:
        """The stacked layers are in the model."""
        with self._cohort, kept_inputs(self._cohort.backbone, self._checkpointing):
            yield

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy in."""
        self._cohort.load_flat(client, flat)

    def read(self, client: int) -> np.ndarray:
        """Copy out."""
        return self._cohort.read_flat(client)

    def parameters(self, client: int) -> list[nn.Parameter]:
        """One flat parameter."""
        return [self._cohort.leaves[client]]

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """Choose clients; adapters with dropout are never stacked."""
        self._cohort.bind(clients)

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Through transformers."""
        return self._cohort.backbone.hidden(input_ids)

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """By automatic differentiation, which hands each client its own slice."""
        hidden.backward(slope)
