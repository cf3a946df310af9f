import pytest
import torch
from torch import nn

from fedllm_flwr.training.flat_optimizer import FlatOptimizer
from fedllm_flwr.training.settings import LocalSettings

SETTINGS = {
    "adamw": LocalSettings(learning_rate=0.1, weight_decay=0.01, beta1=0.8, clip_norm=1.0),
    "sgd": LocalSettings(learning_rate=0.1, optimizer="sgd"),
    "momentum": LocalSettings(learning_rate=0.1, optimizer="sgd", momentum=0.9, clip_norm=0.5),
}


def flat() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 7), requires_grad=False)


def gradients() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(7, generator=random) for _ in range(5)]


@pytest.mark.parametrize("name", SETTINGS)
def test_putting_the_state_away_after_each_step_changes_no_bit(name: str) -> None:
    whole, parts = flat(), flat()
    optimizer, state = FlatOptimizer(whole, SETTINGS[name]), {}
    for gradient in gradients():
        optimizer.step(gradient)
        again = FlatOptimizer(parts, SETTINGS[name])
        again.load(state)
        again.step(gradient)
        state = again.state()
    assert torch.equal(whole, parts)
    assert {values.dtype.name for values in state.values()} <= {"float32"}
    assert all(values.ndim == 1 for values in state.values())


def test_clipping_bounds_a_plain_step_and_leaves_the_gradient_alone() -> None:
    settings = LocalSettings(learning_rate=1.0, optimizer="sgd", clip_norm=0.5)
    values = flat()
    start, gradient = values.detach().clone(), torch.full((7,), 3.0)
    FlatOptimizer(values, settings).step(gradient)
    assert (values - start).norm().item() == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(gradient, torch.full((7,), 3.0))


def test_the_first_step_of_adam_is_its_rate_in_each_value() -> None:
    values = flat()
    start = values.detach().clone()
    FlatOptimizer(values, LocalSettings(learning_rate=0.25)).step(torch.ones(7))
    torch.testing.assert_close(values.detach(), start - 0.25, rtol=0, atol=1e-6)


def test_there_is_no_state_before_a_step() -> None:
    assert FlatOptimizer(flat(), SETTINGS["adamw"]).state() == {}
