import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedllm_flwr.models import loss
from fedllm_flwr.models.loss import (
    LogitTransform,
    frozen_head_losses,
    frozen_head_scores,
)


def problem(
    rows: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, size, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, size, generator=generator, dtype=dtype) / size**0.5
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    return [hidden, head, targets, weights, bias]


def plain(
    hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor, how: LogitTransform
) -> Tensor:
    logits = how.scale * (hidden @ head.t() + bias)
    if how.softcap:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    return functional.cross_entropy(logits, targets, reduction="none")


TRANSFORMS = [
    LogitTransform(),
    LogitTransform(0.25),
    LogitTransform(1.0, 3.0),
    LogitTransform(2.0, 5.0),
]


@given(st.integers(1, 40), st.integers(2, 300), st.sampled_from(TRANSFORMS))
@settings(deadline=None, max_examples=30)
def test_equals_torch_cross_entropy(rows: int, vocabulary: int, how: LogitTransform) -> None:
    hidden, head, targets, weights, bias = problem(rows, 16, vocabulary)
    ours = (frozen_head_losses(hidden, head, targets, bias=bias, transform=how) * weights).sum()
    theirs = (plain(hidden, head, targets, bias, how) * weights).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (own_gradient,) = torch.autograd.grad(ours, hidden)
    (their_gradient,) = torch.autograd.grad(theirs, hidden)
    torch.testing.assert_close(own_gradient, their_gradient, rtol=1e-5, atol=1e-6)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, weights, _ = problem(50, 8, 100)
    whole = (frozen_head_losses(hidden, head, targets) * weights).sum()
    (gradient,) = torch.autograd.grad(whole, hidden)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 100 * 7)  # 7 rows at a time, the last chunk has 1
    pieces = (frozen_head_losses(hidden, head, targets) * weights).sum()
    (gradient_of_pieces,) = torch.autograd.grad(pieces, hidden)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_of_pieces, gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", TRANSFORMS)
def test_gradient_in_float64(how: LogitTransform) -> None:
    hidden, head, targets, _, bias = problem(5, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(
        lambda states: frozen_head_losses(states, head, targets, bias=bias, transform=how),
        (hidden,),
    )


def test_keeps_no_logits() -> None:
    """What autograd saves is the gradient of the hidden states, n x d, and nothing of the vocabulary's size."""
    saved: list[tuple[int, ...]] = []
    hidden, head, targets, _, _ = problem(30, 8, 500)

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        frozen_head_losses(hidden, head, targets).sum().backward()
    assert saved == [(30, 8)]


def test_head_and_bias_get_no_gradient() -> None:
    hidden, head, targets, _, bias = problem(3, 4, 5)
    head.requires_grad_()
    bias.requires_grad_()
    frozen_head_losses(hidden, head, targets, bias=bias).sum().backward()
    assert hidden.grad is not None
    assert head.grad is None
    assert bias.grad is None


def test_row_losses_carry_their_own_gradient_weight() -> None:
    hidden, head, targets, _, _ = problem(4, 4, 6)
    frozen_head_losses(hidden, head, targets)[2].backward()
    assert hidden.grad is not None
    assert hidden.grad[2].abs().sum() > 0
    assert hidden.grad[[0, 1, 3]].abs().sum() == 0


def test_softmax_is_float32_for_half_precision() -> None:
    hidden, head, targets, _, bias = problem(20, 32, 200)
    half = frozen_head_losses(hidden.bfloat16(), head.bfloat16(), targets)
    assert half.dtype == torch.float32
    exact = plain(
        hidden.bfloat16().double(), head.bfloat16().double(), targets, 0 * bias, LogitTransform()
    )
    # the product is rounded to 8 bits, the softmax is not
    assert (half.double() - exact).abs().max() < 0.05


@pytest.mark.parametrize("how", TRANSFORMS)
def test_scores_are_losses_and_argmax(how: LogitTransform) -> None:
    hidden, head, targets, _, bias = problem(20, 8, 30)
    losses, best = frozen_head_scores(hidden, head, targets, bias=bias, transform=how)
    torch.testing.assert_close(losses, plain(hidden, head, targets, bias, how).detach())
    assert torch.equal(best, (how.scale * (hidden @ head.t() + bias)).argmax(1))
    assert not losses.requires_grad


def test_no_rows_give_no_losses() -> None:
    hidden, head, targets, _, _ = problem(3, 4, 5)
    losses, best = frozen_head_scores(hidden[:0], head, targets[:0])
    assert losses.shape == best.shape == (0,)
    assert frozen_head_losses(hidden[:0], head, targets[:0]).sum() == 0
