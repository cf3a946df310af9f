from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.base import BaseRule
from fedllm_flwr.grass.galore import GaloreMatrix, GaloreSettings, left_singular


def by_the_book(
    start: Tensor, steps: list, settings: GaloreSettings, rule: BaseRule, transposed: bool
) -> Tensor:
    """Algorithm 2 with AdamW, on dense gradients."""
    weight = start.clone()
    first = second = torch.zeros(())
    for count, step in enumerate(steps, start=1):
        pairs = [(x, s) if transposed else (s, x) for s, x in step]
        dense = sum(left.t() @ right for left, right in pairs)
        if (count - 1) % settings.refresh_interval == 0:
            left, right = pairs[0]
            turn = torch.linalg.svd(left.t() @ right)[0][:, : settings.rank]
            turn = torch.stack([v if v.max() > -v.min() else -v for v in turn.t()], dim=1)
        projected = turn.t() @ dense
        first = rule.beta1 * first + (1 - rule.beta1) * projected
        second = rule.beta2 * second + (1 - rule.beta2) * projected**2
        root = (second / (1 - rule.beta2**count)).sqrt() + rule.epsilon
        normalised = first / (1 - rule.beta1**count) / root
        weight = weight * (1 - rule.decay)
        weight -= rule.learning_rate * settings.scale * (turn @ normalised)
    return weight


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tall", [False, True])
def test_it_follows_the_equations(
    start: Tensor,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    micro_batches: int,
    tall: bool,
) -> None:
    settings = GaloreSettings(rank=3, refresh_interval=2, scale=0.5)
    rule = BaseRule(learning_rate=0.1, weight_decay=0.3, epsilon=1e-3)
    steps = make_steps(5, micro_batches)
    weight = start.clone()
    if tall:  # the same layer with outputs and inputs exchanged: its update is the transpose
        weight = weight.t().contiguous()
        steps = [[(inputs, slope) for slope, inputs in step] for step in steps]
    matrix = GaloreMatrix(weight, settings, rule)
    play(matrix, steps)
    wanted = by_the_book(start, steps, settings, rule, tall)
    assert torch.allclose(weight.t() if tall else weight, wanted, rtol=1e-8)
    assert torch.equal(matrix.changed()[1], weight)
    assert matrix.state_bytes() == 8 * (2 * 3 * 9 + 6 * 3)


def test_at_full_rank_sgd_is_torchs_own(
    start: Tensor,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    reference: Callable[..., Tensor],
) -> None:
    rule = BaseRule(name="sgd", learning_rate=0.1, weight_decay=0.3)
    steps = make_steps(3, positions=20)  # P is square and orthonormal, so P Pᵀ = I
    weight = start.clone()
    play(GaloreMatrix(weight, GaloreSettings(rank=6, scale=1.0), rule), steps)
    assert torch.allclose(weight, reference(rule, steps), rtol=1e-9)


@pytest.mark.parametrize("positions", [4, 30])
def test_singular_vectors_from_the_factors_are_those_of_the_product(positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(positions, 8, generator=generator, dtype=torch.float64)
    right = torch.randn(positions, 11, generator=generator, dtype=torch.float64)
    found = left_singular(left, right, 3)
    wanted = torch.linalg.svd(left.t() @ right)[0][:, :3]
    assert torch.allclose(found @ found.t(), wanted @ wanted.t(), atol=1e-10)
    beyond = left_singular(left, right, 6)[:, 4:]
    assert bool(beyond.any()) == (positions == 30)  # 4 positions give a gradient of rank 4


def test_a_narrow_weight_stays_narrow(
    start: Tensor, make_steps: Callable[..., list], play: Callable[..., None]
) -> None:
    weight = start.bfloat16()
    before = weight.clone()
    rule = BaseRule(name="sgd", learning_rate=0.5)
    play(GaloreMatrix(weight, GaloreSettings(rank=2), rule), make_steps(1, dtype=torch.bfloat16))
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, before)


def test_bad_settings_are_refused(start: Tensor) -> None:
    with pytest.raises(ConfigError, match="GaLore rank: expected at least 1, got 0"):
        GaloreSettings(rank=0)
    with pytest.raises(ConfigError, match="GaLore refresh_interval"):
        GaloreSettings(refresh_interval=0)
    with pytest.raises(ConfigError, match="GaLore scale: expected a finite number > 0, got -1"):
        GaloreSettings(scale=-1)
    with pytest.raises(ConfigError, match=r"GaLore, matrix of \(6, 9\): .* its 6 rows, got 7"):
        GaloreMatrix(start.clone(), GaloreSettings(rank=7), BaseRule())
