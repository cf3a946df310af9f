import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError, ShapeError, WireError
from fedllm_flwr.reservoir import SurrogateLM, cross_entropy


def prompts_of(batch: int, tokens: int = 3, width: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_loss_and_gradient_are_those_of_autograd(batch, tokens, restricted, seed) -> None:
    ids = [7, 0, 3] if restricted else None
    model = SurrogateLM(9, 5, seed=seed, token_ids=ids)
    prompts = prompts_of(batch, tokens, seed=seed).requires_grad_()
    targets = torch.arange(batch) % 3
    loss, gradient = model.loss_and_gradient(prompts.detach(), targets)
    logits = prompts.mean(1) @ model.weights.double().T
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    wanted.sum().backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, prompts.grad, rtol=0, atol=1e-12)
    assert gradient.shape == prompts.shape


def test_restricted_classes_are_rows_of_the_whole_vocabulary() -> None:
    whole, part = SurrogateLM(9, 5, seed=2), SurrogateLM(9, 5, seed=2, token_ids=[7, 0])
    prompts = prompts_of(4)
    torch.testing.assert_close(part.logits(prompts), whole.logits(prompts)[:, [7, 0]])
    assert part.logits(prompts).shape == (4, 2)
    assert whole.weights.shape == (9, 5)
    assert not torch.equal(whole.weights, SurrogateLM(9, 5, seed=3).weights)


def test_weights_have_the_scale_of_the_width() -> None:
    # 40,000 draws: 5 standard errors of the variance.
    assert SurrogateLM(400, 100).weights.var().item() * 100 == pytest.approx(1, abs=0.036)


def test_the_label_private_way_gives_the_same_bits() -> None:
    """Logits down, slope up, gradient down: no label leaves the client."""
    model, prompts, targets = SurrogateLM(6, 5), prompts_of(4).float(), torch.tensor([5, 0, 2, 2])
    loss, gradient = model.loss_and_gradient(prompts, targets)
    own_loss, slope = cross_entropy(model.logits(prompts), targets)
    assert torch.equal(loss, own_loss)
    assert torch.equal(gradient, model.gradient_from_logit_slope(prompts, slope))
    assert loss.dtype == gradient.dtype == torch.float32


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], dtype=torch.float64)
    loss, slope = cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(loss.exp(), torch.tensor([4.0, 2.0], dtype=torch.float64))
    wanted = torch.tensor([[-0.75, 0.75], [0.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(slope, wanted)


def test_huge_logits_stay_finite() -> None:
    loss, slope = cross_entropy(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))
    assert loss.item() == 1e4
    assert slope.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_outside_the_classes_is_refused(target: int) -> None:
    with pytest.raises(WireError, match=rf"example 1: expected a target below 4, got {target}"):
        SurrogateLM(4, 5).loss_and_gradient(prompts_of(2), torch.tensor([0, target]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits(prompts_of(2, width=6)), r"\[examples, tokens, 5\], got \[2, 3, 6\]"),
        (lambda m: m.logits(torch.ones(2, 5)), r"\[examples, tokens, 5\], got \[2, 5\]"),
        (lambda m: m.logits(torch.ones(2, 0, 5)), r"got \[2, 0, 5\]"),
        (
            lambda m: m.loss_and_gradient(prompts_of(2), torch.tensor([0])),
            r"targets: expected shape \[2\], got \[1\]",
        ),
        (
            lambda m: m.gradient_from_logit_slope(prompts_of(2), torch.ones(2, 3)),
            r"slope: expected shape \[2, 4\], got \[2, 3\]",
        ),
    ],
)
def test_wrong_shapes_are_refused(call, message) -> None:
    with pytest.raises(ShapeError, match=message):
        call(SurrogateLM(4, 5))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="sizes >= 1, got 0 and 5"):
        SurrogateLM(0, 5)
    for ids in ([], [1, 1], [4], [-1]):
        with pytest.raises(ConfigError, match="different tokens below 4"):
            SurrogateLM(4, 5, token_ids=ids)
