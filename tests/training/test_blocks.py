"""Each backward function against automatic differentiation of the plain formula, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from fedllm_flwr.training.blocks import (
    AttentionShape,
    attention,
    attention_backward,
    fan,
    fan_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
)

EPSILON = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slopes_of(output: Tensor, slope: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, slope)


def test_rms_norm() -> None:
    states, weight, slope = draw(6, 8), draw(8, seed=1), draw(6, 8, seed=2)
    states.requires_grad_()
    wanted = weight * states / (states.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
    [wanted_slope] = slopes_of(wanted, slope, states)
    with torch.no_grad():
        found, inverse = rms_norm(states, weight, EPSILON)
        found_slope = rms_norm_backward(slope, states, weight, inverse)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_slope, wanted_slope)


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length), 10 ** (-torch.arange(width // 2) / width)).double()
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def test_rotation_is_orthogonal_and_undone() -> None:
    heads, (cosine, sine) = draw(2, 3, 5, 8), tables(5, 8)
    rotated = rotate(heads, cosine, sine)
    torch.testing.assert_close(rotated.norm(dim=-1), heads.norm(dim=-1))
    torch.testing.assert_close(rotate(rotated, cosine, sine, back=True), heads)
    assert not torch.allclose(rotated[:, :, 1:], heads[:, :, 1:])


def test_rotation_by_hand() -> None:
    # one token at an angle of 90 degrees: (x, y) becomes (-y, x), x and y being the halves of the head
    heads = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = rotate(heads, torch.zeros(1, 4), torch.ones(1, 4))
    assert found.tolist() == [[-3.0, -4.0, 1.0, 2.0]]


@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize(("groups", "per_group"), [(1, 1), (2, 3), (3, 1)])
def test_attention(groups: int, per_group: int, known: int) -> None:
    rows, length, width = 2, 5, 4
    scaling = 1 / math.sqrt(width)
    cosine, sine = tables(known + length, width)
    rotation = cosine[known:], sine[known:]
    past = (draw(groups, known, width, seed=7), draw(groups, known, width, seed=8))
    shape = AttentionShape(
        rows=rows,
        length=length,
        groups=groups,
        per_group=per_group,
        width=width,
        query_rotation=(rotation[0] * scaling, rotation[1] * scaling),
        key_rotation=rotation,
        mask=torch.full((length, known + length), -math.inf, dtype=torch.float64).triu(known + 1),
        past=known,
    )
    positions = rows * length
    inputs = [
        draw(positions, groups * count * width, seed=seed).requires_grad_()
        for seed, count in enumerate((per_group, 1, 1))
    ]

    def heads(
        states: Tensor,
    ) -> Tensor:  # [b, heads, t, f], key heads repeated as transformers does
        split = states.view(rows, length, -1, width).transpose(1, 2)
        return split.repeat_interleave(groups * per_group // split.shape[1], dim=1)

    def behind(own: Tensor, ahead: Tensor) -> Tensor:
        wide = ahead.repeat_interleave(per_group, dim=0).expand(rows, -1, -1, -1)
        return torch.cat([wide, own], dim=2)

    queries, keys, values = (heads(x) for x in inputs)
    wanted = scaled_dot_product_attention(
        rotate_plainly(queries, *rotation),
        behind(rotate_plainly(keys, *rotation), past[0]),
        behind(values, past[1]),
        attn_mask=torch.ones(length, known + length, dtype=torch.bool).tril(known),
    )
    wanted = wanted.transpose(1, 2).reshape(positions, -1)
    slope = draw(*wanted.shape, seed=9)
    wanted_slopes = slopes_of(wanted, slope, *inputs)
    with torch.no_grad():
        found, tape = attention(*inputs, shape, past if known else None)
        found_slopes = attention_backward(slope, tape, shape)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(found_slopes, wanted_slopes, strict=True):
        torch.testing.assert_close(one, other)


def rotate_plainly(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], dim=-1)
    return heads * cosine + turned * sine


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("adapted", [(), ("one",), ("one", "three"), ("one", "two", "three")])
@pytest.mark.parametrize("side", ["both", "a", "b"])
def test_fan(clients: int, adapted: tuple[str, ...], side: str) -> None:
    rank, inputs, scaling = 2, 5, 0.7
    layers = []
    for seed, (name, outputs) in enumerate((("one", 4), ("two", 3), ("three", 4))):
        layer = nn.Linear(inputs, outputs, bias=name == "two", dtype=torch.float64)
        layer.requires_grad_(False)
        layer.weight.copy_(draw(outputs, inputs, seed=seed))
        layers.append((name, layer))
    factors = {
        name: (
            draw(clients, rank, inputs, seed=k).requires_grad_(),
            draw(clients, layer.out_features, rank, seed=10 + k).requires_grad_(),
        )
        for k, (name, layer) in enumerate(layers)
        if name in adapted
    }
    states = draw(clients * 6, inputs, seed=20).requires_grad_()
    wanted = []
    for name, layer in layers:
        output = linear(states, layer.weight, layer.bias)
        if name in factors:
            lora_a, lora_b = factors[name]
            by_client = states.view(clients, -1, inputs)
            update = by_client @ lora_a.transpose(1, 2) @ lora_b.transpose(1, 2)
            output = output + scaling * update.flatten(0, 1)
        wanted.append(output)
    slopes = [draw(*output.shape, seed=30 + k) for k, output in enumerate(wanted)]
    leaves = [states, *(value for pair in factors.values() for value in pair)]
    wanted_slopes = torch.autograd.grad(wanted, leaves, slopes)
    gradients = {
        name: tuple(
            torch.full_like(value, math.nan) if side in ("both", own) else None
            for own, value in zip("ab", pair, strict=True)
        )
        for name, pair in factors.items()
    }
    with torch.no_grad():
        found, tape = fan(states, layers, factors, scaling)
        above = fan_backward(
            slopes, states, tape, layers, factors, scaling=scaling, gradients=gradients
        )
        below = fan_backward(
            slopes,
            states,
            tape,
            layers,
            factors,
            scaling=scaling,
            gradients=gradients,
            wants_inputs=False,
        )
    assert below is None
    assert above is not None
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(above, wanted_slopes[0])
    written = [value for pair in gradients.values() for value in pair]
    for one, other in zip(written, wanted_slopes[1:], strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fan_in_half_precision_is_the_wide_one_to_rounding(
    clients: int, dtype: torch.dtype
) -> None:
    """Products of adapters take bfloat16 where the states have it; with float16 they stay in the factors' float32."""
    layer = nn.Linear(16, 24, bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(draw(24, 16) / 4)
    wide_layer = nn.Linear(16, 24, bias=False, dtype=torch.float64).requires_grad_(False)
    wide_layer.weight.copy_(layer.weight)
    pair = (draw(clients, 4, 16, seed=1).float(), draw(clients, 24, 4, seed=2).float() / 4)
    states, slope = draw(clients * 8, 16, seed=3).to(dtype), draw(clients * 8, 24, seed=4).to(dtype)

    def both_ways(linear_layer: nn.Linear, kind: torch.dtype, values: tuple[Tensor, ...]) -> list[Tensor]:  # fmt: skip
        factors, slots = {"one": values}, {"one": tuple(torch.zeros_like(v) for v in values)}
        layers = [("one", linear_layer)]
        [output], tape = fan(states.to(kind), layers, factors, 2.0)
        back = fan_backward([slope.to(kind)], states.to(kind), tape, layers, factors, scaling=2.0,
                            gradients=slots)  # fmt: skip
        assert tape is not None
        assert back is not None
        assert tape.inner.dtype == (kind if kind in (torch.bfloat16, torch.float64) else torch.float32)  # fmt: skip
        assert all(slot.dtype == value.dtype for slot, value in zip(slots["one"], values, strict=True))  # fmt: skip
        return [output, back, *slots["one"]]

    with torch.no_grad():
        found = both_ways(layer, dtype, pair)
        wanted = both_ways(wide_layer, torch.float64, tuple(value.double() for value in pair))
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < 3 * torch.finfo(dtype).eps * other.norm()
