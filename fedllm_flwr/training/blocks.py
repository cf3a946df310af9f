"""The parts of a Llama block, each as a forward and a backward function on plain tensors.

Automatic differentiation of a frozen model records and keeps far more than the adapters' gradients need. Written
out, a step makes about a third of the passes over memory, and its matrix products dominate its cost. Every
backward function is checked against automatic differentiation by a test.

Axes: N = b * t positions (b rows of t tokens), d hidden size, i inputs and o outputs of a linear layer, K clients
with n = N / K positions each, r rank, R = ranks of all adapted layers of a fan, g query heads for each key head,
p tokens whose keys and values are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Adapted layer -> A [K, r, i] and B [K, o, r], float32; see :func:`adapter_dtype`."""
Past = tuple[Tensor, Tensor]
"""Rotated keys and values [kv, p, f] of p tokens ahead of every row; nothing in them is trained."""
Slopes = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""Where the gradients of A and B go; None where a factor is not trained."""


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square and scale.

    Args:
        states: [N, d].
        weight: [d].
        epsilon: Added to the mean square.

    Returns:
        Normed states [N, d], and the float32 inverse root mean squares [N, 1] for the way back.
    """
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=_sums(states))
    inverse = length.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
    normed = torch.empty_like(states)
    torch.mul(states, inverse, out=normed)  # computed in the wider type, rounded once
    return normed.mul_(weight), inverse


def rms_norm_backward(slope: Tensor, states: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Gradient [N, d] of the states, in the sums' type."""
    scaled = slope * weight
    wide, scaled = states.to(inverse.dtype), scaled.to(inverse.dtype)
    share = (scaled * wide).sum(-1, keepdim=True)
    share.mul_(inverse).mul_(inverse).div_(-states.shape[-1])
    return scaled.addcmul_(wide, share).mul_(inverse)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
    """Rotary position embedding, or its transpose.

    Args:
        heads: [..., t, f] with f even.
        cosine: [t, f].
        sine: [t, f].
        back: Rotate the other way, as the gradient is.

    Returns:
        A new contiguous tensor.

    Source:
        Su et al. 2021 (RoFormer), Eq. 34, with the halves of a head paired as in transformers' Llama.
    """
    half = heads.shape[-1] // 2
    sign = -1.0 if back else 1.0
    rotated = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    torch.mul(heads, cosine, out=rotated)
    rotated[..., :half].addcmul_(heads[..., half:], sine[:, :half], value=-sign)
    rotated[..., half:].addcmul_(heads[..., :half], sine[:, half:], value=sign)
    return rotated


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTape:
    """What attention keeps.

    Attributes:
        queries: Rotated and scaled, [b * kv, g * t, f].
        keys: Rotated, [b * kv, p + t, f].
        values: [b * kv, p + t, f].
        weights: After the softmax, [b * kv, g * t, p + t].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionShape:
    """Sizes of an attention layer and its tables.

    Attributes:
        rows: b.
        length: t.
        groups: Key heads, kv.
        per_group: Query heads of a key head, g.
        width: Size f of a head.
        query_rotation: Cosine and sine [t, f], times the attention's scaling.
        key_rotation: Cosine and sine [t, f].
        mask: 0 and minus infinity [t, p + t], causal.
        past: Tokens p ahead of every row whose keys and values are given.
    """

    rows: int
    length: int
    groups: int
    per_group: int
    width: int
    query_rotation: tuple[Tensor, Tensor]
    key_rotation: tuple[Tensor, Tensor]
    mask: Tensor
    past: int = 0

    def split(self, states: Tensor, per_group: int) -> Tensor:
        """[N, kv * per_group * f] to [b, kv, per_group, t, f], a view."""
        shape = (self.rows, self.length, self.groups, per_group, self.width)
        return states.view(shape).permute(0, 2, 3, 1, 4)

    def merge(self, heads: Tensor, per_group: int) -> Tensor:
        """[b * kv, per_group * t, f] to [N, kv * per_group * f], a copy."""
        shape = (self.rows, self.groups, per_group, self.length, self.width)
        return heads.view(shape).permute(0, 3, 1, 2, 4).reshape(self.rows * self.length, -1)

    def stack(self, heads: Tensor) -> Tensor:
        """[b, kv, per_group, t, f] to [b * kv, per_group * t, f]."""
        return heads.reshape(self.rows * self.groups, -1, self.width)

    def behind(self, past: Tensor, own: Tensor) -> Tensor:
        """[kv, p, f] of all rows ahead of each row's own [b * kv, t, f]: [b * kv, p + t, f]."""
        by_row = own.view(self.rows, self.groups, self.length, self.width)
        return torch.cat([past.expand(self.rows, *past.shape), by_row], dim=2).flatten(0, 1)


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape, past: Past | None = None
) -> tuple[Tensor, AttentionTape]:
    """Causal attention with rotary positions.

    Args:
        queries: [N, kv * g * f], not yet rotated.
        keys: [N, kv * f], not yet rotated.
        values: [N, kv * f].
        shape: Sizes and tables.
        past: Of the tokens ahead of every row, if the shape has any.

    Returns:
        The mixed values [N, kv * g * f], and what the way back needs.
    """
    rotated = shape.stack(rotate(shape.split(queries, shape.per_group), *shape.query_rotation))
    key_heads = shape.stack(rotate(shape.split(keys, 1), *shape.key_rotation))
    value_heads = shape.stack(shape.split(values, 1))
    if past is not None:
        key_heads = shape.behind(past[0], key_heads)
        value_heads = shape.behind(past[1], value_heads)
    scores = torch.bmm(rotated, key_heads.transpose(1, 2))
    scores.view(-1, shape.per_group, *shape.mask.shape).add_(shape.mask)
    weights = torch.softmax(scores, -1)
    mixed = shape.merge(torch.bmm(weights, value_heads), shape.per_group)
    return mixed, AttentionTape(rotated, key_heads, value_heads, weights)


def attention_backward(
    slope: Tensor, tape: AttentionTape, shape: AttentionShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [N, kv * g * f], keys and values [N, kv * f]."""
    heads = shape.stack(shape.split(slope, shape.per_group))
    own = slice(shape.past, None)
    d_values = torch.bmm(tape.weights[..., own].transpose(1, 2), heads)
    d_weights = torch.bmm(heads, tape.values.transpose(1, 2))
    weights = tape.weights
    d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_queries = torch.bmm(d_scores, tape.keys)
    d_keys = torch.bmm(d_scores[..., own].transpose(1, 2), tape.queries)
    return (
        shape.merge(_unrotate(d_queries, shape.query_rotation, shape), shape.per_group),
        shape.merge(_unrotate(d_keys, shape.key_rotation, shape), 1),
        shape.merge(d_values, 1),
    )


def _unrotate(heads: Tensor, rotation: tuple[Tensor, Tensor], shape: AttentionShape) -> Tensor:
    """[b * kv, ... * t, f], rotated back."""
    by_token = heads.view(len(heads), -1, shape.length, shape.width)
    return rotate(by_token, *rotation, back=True).view_as(heads)


@dataclass(frozen=True, slots=True, eq=False)
class FanTape:
    """What the adapters of a fan keep: their A stacked [K, R, i], and scaling * x A^T [K, n, R]."""

    down: Tensor
    inner: Tensor


def fan(
    inputs: Tensor, layers: Sequence[tuple[str, torch.nn.Linear]], factors: Factors, scaling: float
) -> tuple[list[Tensor], FanTape | None]:
    """Linear layers that read the same input, with the adapters that some of them have.

    Args:
        inputs: [N, i].
        layers: Names and frozen layers.
        factors: Adapters by layer name; those of other layers are ignored.
        scaling: Of every adapter.

    Returns:
        Outputs [N, o] of the layers, and what the adapters need on the way back, if there are any.
    """
    outputs = [linear(inputs, layer.weight, layer.bias) for _, layer in layers]
    adapted = [(k, factors[name]) for k, (name, _) in enumerate(layers) if name in factors]
    if not adapted:
        return outputs, None
    dtype = adapter_dtype(inputs, adapted[0][1][0])
    down = torch.cat([lora_a for _, (lora_a, _) in adapted], dim=1).to(dtype)
    inner = _product(inputs.to(dtype), down.transpose(1, 2)).mul_(scaling)
    pieces = inner.chunk(len(adapted), dim=-1)
    for (k, (_, lora_b)), piece in zip(adapted, pieces, strict=True):
        _add_product(outputs[k], piece, lora_b.to(dtype).transpose(1, 2))
    return outputs, FanTape(down, inner)


def fan_backward(
    slopes: Sequence[Tensor],
    inputs: Tensor | None,
    tape: FanTape | None,
    layers: Sequence[tuple[str, torch.nn.Linear]],
    factors: Factors,
    *,
    scaling: float,
    gradients: Slopes,
    wants_inputs: bool = True,
) -> Tensor | None:
    """Gradients of a fan.

    Args:
        slopes: Gradients of the outputs.
        inputs: What the fan read; needed where there is a tape.
        tape: From the forward pass.
        layers: As in :func:`fan`.
        factors: As in :func:`fan`.
        scaling: As in :func:`fan`.
        gradients: Where the adapters' gradients are written, in the shape of the factors; the same
            side in all layers.
        wants_inputs: Whether anything below needs a gradient.

    Returns:
        The gradient of the inputs [N, i], if wanted.
    """
    result: Tensor | None = None
    if wants_inputs:
        for slope, (_, layer) in zip(slopes, layers, strict=True):
            if result is None:
                result = slope @ layer.weight
            else:
                result.addmm_(slope, layer.weight)
    if tape is None or inputs is None:
        return result
    adapted = [(k, name) for k, (name, _) in enumerate(layers) if name in factors]
    backs = []
    for (k, name), inner in zip(adapted, tape.inner.chunk(len(adapted), dim=-1), strict=True):
        wide = slopes[k].to(tape.down.dtype)
        backs.append(_product(wide, factors[name][1].to(tape.down.dtype)))
        if (d_b := gradients[name][1]) is not None:
            d_b.copy_(_outer(inner, wide).transpose(1, 2))
    back = torch.cat(backs, dim=-1).mul_(scaling)
    targets = [d_a for _, name in adapted if (d_a := gradients[name][0]) is not None]
    if targets:
        d_down = _outer(back, inputs.to(tape.down.dtype)).chunk(len(adapted), dim=1)
        for target, value in zip(targets, d_down, strict=True):
            target.copy_(value)
    if result is not None:
        _add_product(result, back, tape.down)
    return result


def adapter_dtype(states: Tensor, factor: Tensor) -> torch.dtype:
    """What the products with adapters are computed in: bfloat16 where the states are, as mixed precision does.

    Their sums, the factors that are trained and the optimizer stay in float32. float16 would lose small gradients, so
    with it the products are the factors' float32 too.
    """
    return torch.bfloat16 if states.dtype == torch.bfloat16 else factor.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add [K, n, p] times [K, p, q] to [N, q] in place; summed in the wider type, rounded once."""
    if total.dtype != left.dtype:
        torch.add(total, _product(left, right).view(total.shape), out=total)
    elif len(right) == 1:
        total.addmm_(left[0], right[0])
    else:
        total.view(len(right), -1, total.shape[-1]).baddbmm_(left, right)


def _sums(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[N, p] or [K, n, p] times [K, p, q] for each client: [K, n, q]."""
    if len(right) == 1:  # a plain product is several times faster than a batch of one
        return (left.reshape(-1, left.shape[-1]) @ right[0])[None]
    return torch.bmm(left.view(len(right), -1, left.shape[-1]), right)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """[K, n, p] and [N, q] to [K, p, q], summed over positions."""
    if len(left) == 1:
        return (left[0].t() @ right)[None]
    return torch.bmm(left.transpose(1, 2), right.view(len(left), -1, right.shape[-1]))
