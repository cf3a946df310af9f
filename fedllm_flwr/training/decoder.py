"""Llama's decoder with low-rank adapters of several clients, forward and backward written out.

transformers' own modules compute the same at a higher cost, for the reason given in `blocks`. `find_decoder`
says which models this path serves; every other model goes through transformers.

Axes: as in `blocks`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.blocks import (
    AttentionShape,
    AttentionTape,
    Factors,
    FanTape,
    Past,
    Slopes,
    attention,
    attention_backward,
    fan,
    fan_backward,
    rms_norm,
    rms_norm_backward,
)

NamedLinear = tuple[str, nn.Linear]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One layer of the decoder: its frozen parts, linear layers by what they read."""

    norms: tuple[Any, Any]
    attention_in: tuple[NamedLinear, ...]
    attention_out: tuple[NamedLinear, ...]
    mlp_in: tuple[NamedLinear, ...]
    mlp_out: tuple[NamedLinear, ...]

    @property
    def names(self) -> set[str]:
        """Its linear layers."""
        fans = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return {name for layers in fans for name, _ in layers}


@dataclass(frozen=True, slots=True, eq=False)
class BlockTape:
    """What one block keeps for the way back; the inputs of a fan only if the fan has adapters."""

    before: Tensor
    inverses: tuple[Tensor, Tensor]
    attention: AttentionTape
    middle: Tensor
    gate: Tensor
    up: Tensor
    active: Tensor
    inputs: list[Tensor | None]
    fans: list[FanTape | None]


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """What a forward pass keeps for the way back, which consumes it.

    Attributes:
        blocks: Of the blocks that the way back passes. A tensor is a block's input alone: the rest is computed again.
        to_inputs: Whether the way back goes on to the embeddings.
        past: As in the forward pass.
    """

    blocks: list[BlockTape | Tensor]
    shape: AttentionShape
    last: Tensor
    inverse: Tensor
    to_inputs: bool
    past: Sequence[Past] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """The adapters of K clients.

    Attributes:
        factors: Their values.
        scaling: Of every adapter.
    """

    factors: Factors
    scaling: float


NO_ADAPTERS = Adapters({}, 1.0)


class LeanDecoder:
    """A decoder over the frozen weights of a backbone. Get it from `find_decoder`.

    Args:
        backbone: A model that has the right parts.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._model = backbone.model.base_model
        prefix = next(name for name, m in backbone.model.named_modules() if m is self._model)
        layers = self._model.layers
        self._blocks = [_block(layer, f"{prefix}.layers.{k}") for k, layer in enumerate(layers)]
        config = self._model.config
        self._groups = config.num_key_value_heads
        self._per_group = config.num_attention_heads // config.num_key_value_heads
        self._width = layers[0].self_attn.head_dim
        self._scaling = layers[0].self_attn.scaling

    def forward(
        self,
        inputs: Tensor,
        adapters: Adapters,
        *,
        keep: bool = False,
        to_inputs: bool = False,
        past: Sequence[Past] | None = None,
        first: int = 0,
        checkpoints: bool = False,
    ) -> tuple[Tensor, Tape]:
        """Compute the final hidden states, without automatic differentiation.

        Args:
            inputs: Token ids [b, t], or the states [b, t, d] that enter the first block computed, which are their
                embeddings if that is block 0; padded on the right. The rows of a client lie together.
            adapters: In the order of the rows.
            keep: Whether :meth:`backward` will follow.
            to_inputs: Whether it shall give the gradient of the embeddings too.
            past: For each layer the keys and values of p tokens that come before every row.
            first: The first block that is computed; no block below it may have an adapter.
            checkpoints: Whether to keep only the inputs of blocks, and to compute a block again when the way back
                reaches it: the same bits for less memory and about one more forward pass.

        Returns:
            States [b, t, d] after the last norm, and the tape; the tape has no blocks unless kept.
        """
        rows, length = inputs.shape[:2]
        embedded = inputs if inputs.is_floating_point() else self._model.embed_tokens(inputs)
        states = embedded.flatten(0, 1)
        shape = self._attention_shape(states, rows, length, past[0][0].shape[1] if past else 0)
        lowest = first if to_inputs else self.lowest(adapters.factors)
        tapes: list[BlockTape | Tensor] = []
        for k, block in enumerate(self._blocks[first:], start=first):
            before = states
            states, tape = _block_forward(block, before, shape, adapters, past[k] if past else None)
            if keep and k >= lowest:
                tapes.append(before if checkpoints else tape)
            del tape  # or its activations would stay while the next block computes
        norm = self._model.norm
        normed, inverse = rms_norm(states, norm.weight, norm.variance_epsilon)
        return normed.view(rows, length, -1), Tape(tapes, shape, states, inverse, to_inputs, past)

    def backward(
        self, slope: Tensor, tape: Tape, adapters: Adapters, gradients: Slopes
    ) -> Tensor | None:
        """Write the gradients of the adapters.

        Args:
            slope: Gradient of the final hidden states [b, t, d].
            tape: Of the forward pass; empty afterwards.
            adapters: As in the forward pass.
            gradients: Where they are written, in the shape of the factors.

        Returns:
            The gradient of the embeddings [b, t, d], if the tape was kept for it.
        """
        flat = slope.reshape(tape.last.shape)
        norm = self._model.norm
        flat = rms_norm_backward(flat, tape.last, norm.weight, tape.inverse).to(tape.last.dtype)
        for index in reversed(range(len(self._blocks))):
            if not tape.blocks:
                return None
            block, kept = self._blocks[index], self._kept(index, tape, adapters)
            lowest = not tape.blocks and not tape.to_inputs
            _block_backward(block, flat, kept, tape.shape, (adapters, gradients), is_lowest=lowest)
        return flat.view_as(slope) if tape.to_inputs else None

    def entering(self, input_ids: Tensor, block: int) -> Tensor:
        """The states [b, t, d] that enter a block of the model without adapters; token ids as in :meth:`forward`."""
        states = self._model.embed_tokens(input_ids).flatten(0, 1)
        rows, length = input_ids.shape
        shape = self._attention_shape(states, rows, length, 0)
        for below in self._blocks[:block]:
            states, _ = _block_forward(below, states, shape, NO_ADAPTERS, None)
        return states.view(rows, length, -1)

    def _kept(self, index: int, tape: Tape, adapters: Adapters) -> BlockTape:
        """Take what a block has kept off the tape; where that is its input alone, compute the block again."""
        kept = tape.blocks.pop()
        if isinstance(kept, BlockTape):
            return kept
        past = tape.past[index] if tape.past else None
        return _block_forward(self._blocks[index], kept, tape.shape, adapters, past)[1]

    def lowest(self, names: Iterable[str]) -> int:
        """Index of the first block that has one of these layers."""
        wanted = set(names)
        found = (k for k, block in enumerate(self._blocks) if block.names & wanted)
        return next(found, len(self._blocks))

    def _attention_shape(self, states: Tensor, rows: int, length: int, past: int) -> AttentionShape:
        positions = torch.arange(past, past + length, device=states.device)[None]
        cosine, sine = (table[0] for table in self._model.rotary_emb(states[None], positions))
        size = (length, past + length)
        mask = torch.full(size, float("-inf"), dtype=states.dtype, device=states.device)
        return AttentionShape(
            rows=rows,
            length=length,
            groups=self._groups,
            per_group=self._per_group,
            width=self._width,
            query_rotation=(cosine * self._scaling, sine * self._scaling),
            key_rotation=(cosine, sine),
            mask=mask.triu_(past + 1),
            past=past,
        )


def _block(layer: Any, prefix: str) -> Block:
    def named(*paths: str) -> tuple[NamedLinear, ...]:
        return tuple((f"{prefix}.{path}", layer.get_submodule(path)) for path in paths)

    return Block(
        norms=(layer.input_layernorm, layer.post_attention_layernorm),
        attention_in=named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out=named("self_attn.o_proj"),
        mlp_in=named("mlp.gate_proj", "mlp.up_proj"),
        mlp_out=named("mlp.down_proj"),
    )


def _block_forward(
    block: Block, before: Tensor, shape: AttentionShape, adapters: Adapters, past: Past | None
) -> tuple[Tensor, BlockTape]:
    values = (adapters.factors, adapters.scaling)
    first, second = block.norms
    normed, inverse = rms_norm(before, first.weight, first.variance_epsilon)
    (queries, keys, heads), fan_in = fan(normed, block.attention_in, *values)
    mixed, attention_tape = attention(queries, keys, heads, shape, past)
    [middle], fan_out = fan(mixed, block.attention_out, *values)
    middle += before
    normed_middle, inverse_middle = rms_norm(middle, second.weight, second.variance_epsilon)
    (gate, up), mlp_in = fan(normed_middle, block.mlp_in, *values)
    active = silu(gate)
    product = active * up
    [after], mlp_out = fan(product, block.mlp_out, *values)
    after += middle
    fans = [fan_in, fan_out, mlp_in, mlp_out]
    inputs = [normed, mixed, normed_middle, product]
    return after, BlockTape(
        before=before,
        inverses=(inverse, inverse_middle),
        attention=attention_tape,
        middle=middle,
        gate=gate,
        up=up,
        active=active,
        inputs=[x if tape else None for x, tape in zip(inputs, fans, strict=True)],
        fans=fans,
    )


def _block_backward(
    block: Block,
    slope: Tensor,
    tape: BlockTape,
    shape: AttentionShape,
    adapted: tuple[Adapters, Slopes],
    *,
    is_lowest: bool,
) -> None:
    """Turn ``slope`` in place from the gradient of the block's output into that of its input.

    Of the lowest block it becomes only a part of that, since nothing below needs it.
    """
    adapters, gradients = adapted
    layers = (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out)

    def back(index: int, *slopes: Tensor, wanted: bool = True) -> Any:
        return fan_backward(
            slopes,
            tape.inputs[index],
            tape.fans[index],
            layers[index],
            adapters.factors,
            scaling=adapters.scaling,
            gradients=gradients,
            wants_inputs=wanted,
        )

    first, second = block.norms
    d_product = back(3, slope)
    d_up = d_product * tape.active
    d_gate = torch.ops.aten.silu_backward(d_product.mul_(tape.up), tape.gate)
    d_middle = rms_norm_backward(
        back(2, d_gate, d_up), tape.middle, second.weight, tape.inverses[1]
    )
    torch.add(slope, d_middle, out=slope)
    d_heads = attention_backward(back(1, slope), tape.attention, shape)
    d_normed = back(0, *d_heads, wanted=not is_lowest)
    if d_normed is not None:
        d_before = rms_norm_backward(d_normed, tape.before, first.weight, tape.inverses[0])
        torch.add(slope, d_before, out=slope)
