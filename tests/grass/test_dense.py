from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedllm_flwr.grass.base import BaseRule
from fedllm_flwr.grass.dense import DenseMatrix


@pytest.mark.parametrize("transposed", [False, True])  # as transformers' Conv1D holds its weight
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_is_torchs_own_optimizer(
    start: Tensor,
    rule: BaseRule,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    reference: Callable[..., Tensor],
    micro_batches: int,
    transposed: bool,
) -> None:
    steps = make_steps(4, micro_batches)
    weight = (
        start.t().clone(memory_format=torch.contiguous_format).t() if transposed else start.clone()
    )
    assert weight.is_contiguous() != transposed
    matrix = DenseMatrix(weight, rule)
    play(matrix, steps)
    assert torch.allclose(weight, reference(rule, steps), rtol=1e-10)
    indices, values = matrix.changed()
    assert indices.tolist() == list(range(6))
    assert torch.equal(values, weight)


def test_a_narrow_weight_takes_rounded_steps(
    start: Tensor, make_steps: Callable[..., list], play: Callable[..., None]
) -> None:
    rule = BaseRule(name="sgd", learning_rate=0.01, weight_decay=0.1)
    steps = make_steps(1, micro_batches=2, dtype=torch.bfloat16)
    weight = start.bfloat16()
    wanted = weight.float()
    wanted -= 0.01 * (sum((s.t() @ x).float() for s, x in steps[0]) + 0.1 * wanted)
    play(DenseMatrix(weight, rule), steps)
    assert torch.allclose(weight.float(), wanted, rtol=2**-8, atol=1e-3)
    assert weight.dtype == torch.bfloat16
