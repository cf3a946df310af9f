"""The lean decoder's way back through layers that hand out the factors of their weight gradients.

The forward pass is that of `decoder` without adapters. It keeps no inputs of linear layers: on the way back they
are made again from what is kept, at the cost of some passes over memory and one small product a block.

Axes: as in `blocks`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm_flwr.grass.linear import Receive
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.blocks import (
    AttentionShape,
    attention_backward,
    fan_backward,
    rms_norm_backward,
)
from fedllm_flwr.training.decoder import (
    NO_ADAPTERS,
    Block,
    BlockTape,
    LeanDecoder,
    NamedLinear,
    Tape,
)
from fedllm_flwr.training.find_decoder import find_decoder


class HookedDecoder(LeanDecoder):
    """A lean decoder whose layers have receivers. Get it from :func:`hooked_decoder`."""

    def factors(self, slope: Tensor, tape: Tape, receivers: Mapping[str, Receive]) -> None:
        """Hand each layer's factors to its receiver, from the last layer to the first one that has any.

        A receiver may change its layer's weight in place: the layers that read the same input are passed by then.

        Args:
            slope: Gradient of the final hidden states [b, t, d].
            tape: Of a forward pass without adapters that was kept for its inputs; empty afterwards.
            receivers: By layer name.
        """
        norm = self._model.norm
        flat = slope.reshape(tape.last.shape)
        flat = rms_norm_backward(flat, tape.last, norm.weight, tape.inverse).to(tape.last.dtype)
        lowest = self.lowest(receivers)
        for index in reversed(range(lowest, len(self._blocks))):
            block, kept = self._blocks[index], self._kept(index, tape, NO_ADAPTERS)
            _block_factors(block, flat, kept, tape.shape, receivers, is_lowest=index == lowest)
        tape.blocks.clear()


def hooked_decoder(backbone: Backbone) -> HookedDecoder | None:
    """A hooked decoder, where the lean decoder can stand in for the plain model."""
    return None if find_decoder(backbone) is None else HookedDecoder(backbone)


def _block_factors(
    block: Block,
    slope: Tensor,
    tape: BlockTape,
    shape: AttentionShape,
    receivers: Mapping[str, Receive],
    *,
    is_lowest: bool,
) -> None:
    """As the lean decoder's own way back through a block; ``slope`` is turned in place in the same way."""

    def back(
        layers: tuple[NamedLinear, ...], inputs: Tensor, *slopes: Tensor, wanted: bool = True
    ) -> Tensor:
        below = fan_backward(
            slopes, None, None, layers, {}, scaling=1.0, gradients={}, wants_inputs=wanted
        )
        for (name, _), own in zip(layers, slopes, strict=True):
            if name in receivers:
                receivers[name](own, inputs)
        return below  # type: ignore[return-value]  # None only where it is not wanted

    first, second = block.norms
    d_product = back(block.mlp_out, tape.active * tape.up, slope)
    d_up = d_product * tape.active
    d_gate = torch.ops.aten.silu_backward(d_product.mul_(tape.up), tape.gate)
    normed = _normed(tape.middle, second.weight, tape.inverses[1])
    d_normed = back(block.mlp_in, normed, d_gate, d_up)
    torch.add(
        slope, rms_norm_backward(d_normed, tape.middle, second.weight, tape.inverses[1]), out=slope
    )
    kept = tape.attention
    mixed = shape.merge(torch.bmm(kept.weights, kept.values), shape.per_group)
    d_heads = attention_backward(back(block.attention_out, mixed, slope), kept, shape)
    normed = _normed(tape.before, first.weight, tape.inverses[0])
    d_normed = back(block.attention_in, normed, *d_heads, wanted=not is_lowest)
    if not is_lowest:
        d_before = rms_norm_backward(d_normed, tape.before, first.weight, tape.inverses[0])
        torch.add(slope, d_before, out=slope)


def _normed(states: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """What `rms_norm` gave, from the inverse that it kept."""
    normed = torch.empty_like(states)
    torch.mul(states, inverse, out=normed)
    return normed.mul_(weight)
