import numpy as np
import pytest
import torch

from clients.guard import guarded, slope_before_clip
from fedllm_flwr.settings.methods import FedResPromptConfig


def method(clip: float, noise: float = 0.0) -> FedResPromptConfig:
    return FedResPromptConfig(name="fedresprompt", clip_norm=clip, noise_multiplier=noise)


def prompts(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_off_means_untouched() -> None:
    values = prompts()
    assert guarded(method(0.0), values) is values
    assert slope_before_clip(method(0.0), values, values) is values


def test_long_prompts_are_scaled_to_the_norm_and_short_ones_stay() -> None:
    values = prompts() * torch.tensor([0.01, 1, 2, 3, 4.0])[:, None, None]
    sent = guarded(method(1.0), values)
    norms, before = sent.flatten(1).norm(dim=1), values.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, before.clamp_max(1.0))
    assert torch.equal(sent[0], values[0])
    cosine = torch.cosine_similarity(sent.flatten(1), values.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))


def test_the_slope_is_that_of_autograd_through_the_clip() -> None:
    values = (prompts() * torch.tensor([0.1, 1, 2, 3, 4.0])[:, None, None]).requires_grad_()
    norms = values.flatten(1).norm(dim=1)[:, None, None]
    clipped = values * (1.0 / norms).clamp_max(1.0)
    torch.testing.assert_close(guarded(method(1.0), values.detach()), clipped.detach())
    slope = prompts(1)
    [wanted] = torch.autograd.grad(clipped, values, slope)
    found = slope_before_clip(method(1.0), values.detach(), slope)
    torch.testing.assert_close(found, wanted)


def test_noise_has_its_size_and_cannot_be_drawn_again() -> None:
    values = torch.zeros(200, 4, 16)
    one, two = (guarded(method(2.0, 0.5), values).numpy() for _ in range(2))
    assert one.std() == pytest.approx(1.0, rel=0.05)
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.05
