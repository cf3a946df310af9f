from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.grass.base import BaseRule
from fedllm_flwr.grass.optimizer import GrassMatrix, GrassSettings, Side, gradient_norms
from fedllm_flwr.grass.selection import RowRule, Rows

SIZES: dict[Side, int] = {"out": 6, "in": 9}
SOME = GrassSettings(rank=2, rule="top_r", refresh_interval=3, scale=0.5)


def draws() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("rule_name", ["top_r", "norm_nr", "norm2_nr", "uniform_nr", "frozen_pass"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_with_all_rows_it_is_its_base_optimizer(
    start: Tensor,
    rule: BaseRule,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    reference: Callable[..., Tensor],
    side: Side,
    rule_name: RowRule,
    micro_batches: int,
) -> None:
    settings = GrassSettings(rank=SIZES[side], rule=rule_name, refresh_interval=10**6, side=side)
    steps = make_steps(5, micro_batches)
    weight = start.clone()
    matrix = GrassMatrix(weight, settings, rule, draws())
    play(matrix, steps)
    assert torch.allclose(weight, reference(rule, steps), rtol=1e-10)
    indices, values = matrix.changed()
    assert indices.tolist() == list(range(SIZES[side]))
    assert torch.equal(values, weight if side == "out" else weight.t())


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("rule_name", ["top_r", "norm_r", "norm2_nr", "uniform_r", "frozen_pass"])
def test_between_refreshes_only_the_chosen_rows_change(
    start: Tensor,
    rule: BaseRule,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    side: Side,
    rule_name: RowRule,
) -> None:
    weight = start.clone()
    matrix = GrassMatrix(weight, replace(SOME, rule=rule_name, side=side), rule, draws())
    seen: set[int] = set()
    for count, step in enumerate(make_steps(7)):
        before = weight.clone()
        chosen = matrix.indices.tolist() if count % 3 else None
        play(matrix, [step])
        changed = (weight != before).any(1 if side == "out" else 0).nonzero().flatten().tolist()
        assert changed == matrix.indices.tolist()
        assert chosen in (None, changed)
        assert 1 <= len(changed) <= 2
        seen |= set(changed)
    indices, values = matrix.changed()
    assert indices.tolist() == sorted(seen)
    rows = weight if side == "out" else weight.t()
    assert torch.equal(values, rows[torch.from_numpy(indices)])


@pytest.mark.parametrize("rule_name", ["norm_nr", "norm2_r", "frozen_pass"])
def test_the_dense_gradient_is_never_formed(
    start: Tensor,
    rule: BaseRule,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    shapes: Callable[[], Any],
    rule_name: RowRule,
) -> None:
    matrix = GrassMatrix(start.clone(), replace(SOME, rule=rule_name), rule, draws())
    steps = make_steps(4, micro_batches=2, positions=3)  # few positions: not at a refresh either
    with shapes() as made:
        play(matrix, steps)
    assert (len(matrix.indices), 9) in made.seen
    assert not made.seen & {(6, 9), (9, 6)}


def test_a_step_by_hand(start: Tensor, make_steps: Callable[..., list]) -> None:
    """W[σ] <- W[σ] - η α ρ (ρ G[σ] + ρ λ W[σ]) under SGD."""
    [[(slope, inputs)]] = make_steps(1)
    weight = start.clone()
    given = Rows(np.array([1, 4]), np.array([2.0, 0.5], dtype=np.float32))
    rule = BaseRule(name="sgd", learning_rate=0.1, weight_decay=0.3)
    matrix = GrassMatrix(weight, SOME, rule, draws(), rows=given)
    matrix.add(slope, inputs)
    matrix.step()
    wanted = start.clone()
    gradient = slope.t() @ inputs + 0.3 * start
    wanted[1] -= 0.1 * 0.5 * 4.0 * gradient[1]
    wanted[4] -= 0.1 * 0.5 * 0.25 * gradient[4]
    assert torch.allclose(weight, wanted, rtol=1e-12)


def test_moments_begin_anew_at_a_refresh(
    start: Tensor, make_steps: Callable[..., list], play: Callable[..., None]
) -> None:
    rule = BaseRule(learning_rate=0.1)
    steps = make_steps(4)
    weight = start.clone()
    matrix = GrassMatrix(weight, SOME, rule, draws())
    play(matrix, steps[:3])
    before = weight.clone()
    play(matrix, steps[3:])
    fresh = before.clone()
    play(GrassMatrix(fresh, SOME, rule, draws()), steps[3:])
    assert torch.equal(weight, fresh)
    later = before.clone()
    rows = Rows(matrix.indices, np.ones(2, dtype=np.float32))
    play(GrassMatrix(later, SOME, rule, draws(), rows=rows), [steps[2], steps[3]])
    assert not torch.equal(weight, later)


@pytest.mark.parametrize("rule_name", ["norm_nr", "frozen_pass", "uniform_r"])
def test_given_rows_stay_and_no_norms_are_taken(
    start: Tensor,
    make_steps: Callable[..., list],
    play: Callable[..., None],
    shapes: Callable[[], Any],
    rule_name: RowRule,
) -> None:
    given = Rows(np.array([0, 5]), np.ones(2, dtype=np.float32))
    settings = replace(SOME, rule=rule_name)
    weight = start.clone()
    matrix = GrassMatrix(weight, settings, BaseRule(), draws(), rows=given)
    with shapes() as made:
        # so many positions that norms would be cheapest from the dense gradient
        play(matrix, make_steps(7, micro_batches=2, positions=40))
    assert not made.seen & {(6, 9), (6,), (40, 40)}
    assert matrix.indices.tolist() == [0, 5]
    assert matrix.changed()[0].tolist() == [0, 5]
    assert (weight != start).any(1).tolist() == [True, False, False, False, False, True]


def test_norms_of_the_other_side(make_steps: Callable[..., list]) -> None:
    [[(slope, inputs)]] = make_steps(1)
    found = gradient_norms(slope, inputs, "norm_r", "in")
    assert torch.allclose(found, (slope.t() @ inputs).square().sum(0))
    assert torch.allclose(
        gradient_norms(slope, inputs, "frozen_pass", "in"), inputs.square().sum(0)
    )
    assert gradient_norms(slope, inputs, "uniform_nr", "in") is None


def test_state_has_as_many_rows_as_are_chosen(
    start: Tensor, make_steps: Callable[..., list], play: Callable[..., None]
) -> None:
    for side, width in (("out", 9), ("in", 6)):
        matrix = GrassMatrix(start.clone(), replace(SOME, side=side), BaseRule(), draws())
        play(matrix, make_steps(2))
        assert matrix.state_bytes() == 2 * 2 * width * 8 + 2 * 8  # two moments and int64 indices
    narrow = GrassMatrix(start.bfloat16(), SOME, BaseRule(), draws())
    play(narrow, make_steps(2, dtype=torch.bfloat16))
    assert narrow.state_bytes() == 3 * 2 * 9 * 4 + 2 * 8


def test_small_steps_are_not_lost_in_a_narrow_weight(
    start: Tensor, make_steps: Callable[..., list], play: Callable[..., None]
) -> None:
    """40 steps of a thousandth of the weight, each less than bfloat16 can hold."""
    weight = start.bfloat16()
    before = weight.clone()
    rate = 1e-3 * float(weight.abs().median())
    settings = GrassSettings(rank=6, rule="top_r", refresh_interval=40)
    steps = make_steps(1, dtype=torch.bfloat16) * 40  # Adam moves by the rate, always the same way
    matrix = GrassMatrix(weight, settings, BaseRule(learning_rate=rate), draws())
    play(matrix, steps)
    moved = matrix.changed()[1] - before.float()
    assert torch.allclose(moved.abs(), torch.full_like(moved, 40 * rate), rtol=1e-2)
    assert torch.equal(weight, matrix.changed()[1].bfloat16())
    kept = weight.clone()
    play(matrix, steps[:1])  # refreshed: begins at what the weight holds
    assert (matrix.changed()[1] - kept.float()).abs().max() < 2 * rate


def test_bad_settings_are_refused(start: Tensor) -> None:
    for bad, message in (
        ({"rank": 0}, "GRASS rank: expected at least 1, got 0"),
        ({"refresh_interval": 0}, "GRASS refresh_interval: expected at least 1, got 0"),
        ({"scale": float("inf")}, "GRASS scale: expected a finite number > 0, got inf"),
        ({"rule": "best"}, "GRASS rule: expected top_r, .*, got 'best'"),
        ({"side": "left"}, "GRASS side: expected out, in, got 'left'"),
    ):
        with pytest.raises(ConfigError, match=message):
            GrassSettings(**bad)
    with pytest.raises(ConfigError, match=r"GRASS, matrix of \(6, 9\): .* its 6 rows, got 7"):
        GrassMatrix(start.clone(), replace(SOME, rank=7), BaseRule(), draws())
    rows = Rows(np.array([6]), np.ones(1, dtype=np.float32))
    with pytest.raises(ShapeError, match="rows below 6, got 6"):
        GrassMatrix(start.clone(), SOME, BaseRule(), draws(), rows=rows)
