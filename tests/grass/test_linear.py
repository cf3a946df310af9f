from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm_flwr.grass.linear import (
    HookedLinear,
    column_norms_squared,
    row_norms_squared,
    rows_of_gradient,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bias", [None, draw(5, seed=9)])
def test_forward_and_input_gradient_are_those_of_a_plain_layer(bias: Tensor | None) -> None:
    weight, inputs, slope = draw(5, 3), draw(2, 4, 3, seed=1), draw(2, 4, 5, seed=2)
    received: list[tuple[Tensor, Tensor]] = []
    layer = HookedLinear(weight, bias, lambda left, right: received.append((left, right)))
    wanted_weight, wanted_inputs = weight.clone().requires_grad_(), inputs.clone().requires_grad_()
    wanted = torch.nn.functional.linear(wanted_inputs, wanted_weight, bias)
    wanted.backward(slope)
    inputs.requires_grad_()
    found = layer(inputs)
    found.backward(slope)
    assert torch.equal(found, wanted)
    assert torch.allclose(inputs.grad, wanted_inputs.grad, rtol=1e-12)
    [(left, right)] = received
    assert (left.shape, right.shape) == ((8, 5), (8, 3))
    assert torch.allclose(left.t() @ right, wanted_weight.grad, rtol=1e-12)
    rows = torch.tensor([0, 3])
    # G_C = Pᵀ G
    assert torch.allclose(rows_of_gradient(left, right, rows), wanted_weight.grad[rows], rtol=1e-12)
    assert torch.allclose(row_norms_squared(left, right), wanted_weight.grad.square().sum(1))
    assert torch.allclose(column_norms_squared(left), slope.flatten(0, 1).square().sum(0))


def test_the_factors_come_also_where_nothing_below_wants_a_gradient() -> None:
    received: list[Tensor] = []
    layer = HookedLinear(draw(5, 3), None, lambda left, right: received.extend((left, right)))
    layer(draw(4, 3)).sum().backward()
    assert len(received) == 2


def test_the_receiver_may_change_the_weight() -> None:
    weight, inputs = draw(5, 3), draw(4, 3).requires_grad_()
    wanted = torch.ones(4, 5, dtype=torch.float64) @ weight
    HookedLinear(weight, None, lambda left, right: weight.zero_())(inputs).sum().backward()
    assert torch.equal(inputs.grad, wanted)
    assert not weight.any()


@pytest.mark.parametrize("positions", [4, 40])
def test_row_norms_are_right_either_way(positions: int, shapes: Callable[[], Any]) -> None:
    left, right = draw(positions, 11), draw(positions, 7, seed=1)
    with shapes() as made:
        found = row_norms_squared(left, right)
    assert torch.allclose(found, (left.t() @ right).square().sum(1), rtol=1e-12)
    assert ((11, 7) in made.seen) == (positions == 40)


def test_rows_are_taken_without_the_others(shapes: Callable[[], Any]) -> None:
    left, right = draw(4, 11), draw(4, 7, seed=1)
    with shapes() as made:
        rows_of_gradient(left, right, torch.tensor([1, 4]))
    assert (2, 7) in made.seen
    assert not made.seen & {(11, 7), (7, 11)}


def test_narrow_factors_are_summed_in_float32() -> None:
    left, right = (
        draw(4, 11, dtype=torch.bfloat16),
        draw(4, 7, seed=1, dtype=torch.bfloat16),
    )
    exact = (left.double().t() @ right.double()).square().sum(1)
    assert torch.allclose(row_norms_squared(left, right).double(), exact, rtol=1e-5)
    assert rows_of_gradient(left, right, torch.tensor([0])).dtype == torch.float32
