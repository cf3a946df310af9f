import importlib.util

import pytest
import torch

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.base import BaseOptimizer, BaseRule


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_sgd(momentum: float) -> None:
    base = BaseOptimizer(BaseRule(name="sgd", learning_rate=0.1, momentum=momentum), scale=0.5)
    velocity = torch.zeros(3, 4, dtype=torch.float64)
    for gradient in gradients(3):
        velocity = momentum * velocity + gradient
        assert torch.allclose(base.move(gradient.clone()), -0.05 * velocity, rtol=1e-12)


def test_steps_of_adam_and_what_a_reset_forgets() -> None:
    rule = BaseRule(learning_rate=0.1, beta1=0.5, beta2=0.75, epsilon=1e-3)
    base = BaseOptimizer(rule)
    assert base.state_bytes() == 0
    one, two = gradients(2)
    first = base.move(one.clone())
    # bias correction makes the first moment of the first step the gradient itself
    assert torch.allclose(first, -0.1 * one / (one.abs() + 1e-3), rtol=1e-12)
    assert base.state_bytes() == 2 * one.nbytes
    mean = (0.5 * 0.5 * one + 0.5 * two) / (1 - 0.5**2)
    square = (0.75 * 0.25 * one**2 + 0.25 * two**2) / (1 - 0.75**2)
    assert torch.allclose(base.move(two.clone()), -0.1 * mean / (square.sqrt() + 1e-3), rtol=1e-12)
    base.reset()
    assert base.state_bytes() == 0
    assert torch.equal(base.move(one.clone()), first)


def test_weight_decay_is_a_penalty_in_sgd_and_decoupled_in_adam() -> None:
    settings = {"learning_rate": 0.5, "weight_decay": 0.2}
    sgd, adam = BaseRule(name="sgd", **settings), BaseRule(name="adamw", **settings)
    assert (sgd.penalty, sgd.decay) == (0.2, 0.0)
    assert (adam.penalty, adam.decay) == (0.0, pytest.approx(0.1))


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="adam8bit: expected the package bitsandbytes, which is"):
        BaseRule(name="adam8bit")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("transposed", [False, True])
def test_eight_bits_move_values_nearly_as_adam_does_with_a_quarter_of_its_state(
    transposed: bool,
) -> None:
    found, wanted = torch.zeros(64, 128), torch.zeros(64, 128)
    if transposed:  # as the weight of transformers' Conv1D
        found = torch.zeros(128, 64).t()
    bases = [BaseOptimizer(BaseRule(name=n, learning_rate=0.1)) for n in ("adam8bit", "adamw")]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        gradient = 0.3 + torch.randn(64, 128, generator=generator)
        for base, values in zip(bases, (found, wanted), strict=True):
            base.apply(values, gradient.clone())
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.03
    # 2 bytes a value instead of 8; a scale for each 256 values, and two tables of 256 levels
    scales, tables = 2 * 4 * 64 * 128 // 256, 2 * 4 * 256
    assert bases[0].state_bytes() == 2 * 64 * 128 + scales + tables
    assert bases[1].state_bytes() == 8 * 64 * 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "expected one of sgd, adamw, adam8bit, got 'adam'"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and >= 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be finite"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, "beta2"),
        ({"epsilon": 0.0}, "epsilon must be > 0"),
        ({"momentum": 0.9}, "momentum must be 0 without sgd, got 0.9"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BaseRule(**settings)
