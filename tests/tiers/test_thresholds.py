from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.cascade import histogram, levels_of, recording, solve, tier_outcomes
from fedllm_flwr.cascade.accounts import TOKENS
from fedllm_flwr.settings.cascade import CascadeConfig, MemberConfig, TierConfig
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tiers.recorded import record_lines
from fedllm_flwr.tiers.thresholds import calibrated_thetas, tier_histogram

Fixture = Callable[..., Any]


def chain(*names: str, **options: Any) -> CascadeConfig:
    members = (MemberConfig(model="tiny"),)
    return CascadeConfig(
        name="c", tiers=tuple(TierConfig(name=name, members=members) for name in names), **options
    )


def answers(tier: str, rights: list[tuple[int, bool]], members: int = 2) -> list[dict[str, Any]]:
    """Queries that so many of the members answer alike, rightly or not; the others answer something else, wrongly."""
    return [
        {"query": f"q{n}", "tier": tier, "member": m, "answer": "x" if m < votes else f"y{m}",
         "correct": right if m < votes else False, "input_tokens": 1, "output_tokens": 1}
        for n, (votes, right) in enumerate(rights) for m in range(members)
    ]  # fmt: skip


def test_a_later_tier_is_calibrated_on_what_reaches_it() -> None:
    """Tier b is wrong where tier a answers, which does not matter, and right where it does not."""
    first = [(2, True)] * 60 + [(1, False)] * 60
    second = [(2, False)] * 60 + [(2, True)] * 60
    lines = [*answers("a", first), *answers("b", second)]
    found = calibrated_thetas(recording(enumerate(lines), "x"), chain("a", "b", "c"))
    assert [own.theta for own in found] == [1.0, 1.0]
    assert [(own.accepted, own.errors, own.total) for own in found] == [(60, 0, 120), (60, 0, 60)]


def test_a_tier_that_is_never_safe_defers_all_to_the_next() -> None:
    lines = [*answers("a", [(2, False)] * 80), *answers("b", [(2, True)] * 80)]
    found = calibrated_thetas(recording(enumerate(lines), "x"), chain("a", "b", "c"))
    assert found[0].theta == np.inf
    assert found[1].total == 80


def test_a_tiers_histogram_is_that_of_its_recording(task: Task, tier: Fixture) -> None:
    own = tier("a", 1, 2, 3)
    rows = task.splits["test"]
    found = tier_histogram(own, task, rows)
    lines = enumerate(record_lines([own], task, rows))
    outcomes = tier_outcomes(recording(lines, "x").tiers["a"], TOKENS)
    wanted = histogram(outcomes.level, outcomes.correct, levels_of(3))
    assert (found.edges, found.total.tolist()) == (wanted.edges, wanted.total.tolist())
    assert found.correct.tolist() == wanted.correct.tolist()
    assert found.total.sum() == len(rows)


def test_without_queries_the_counts_are_zero_and_nothing_is_safe(task: Task, tier: Fixture) -> None:
    counts = tier_histogram(tier("a", 1, 2), task, [])
    assert counts.total.tolist() == [0, 0, 0]
    assert solve(counts, 0.1).theta == np.inf


def test_histograms_of_parts_add_up_to_that_of_all(task: Task, tier: Fixture) -> None:
    own, rows = tier("a", 1, 2), task.splits["test"]
    parts = tier_histogram(own, task, rows[:5]) + tier_histogram(own, task, rows[5:])
    assert parts.correct.tolist() == tier_histogram(own, task, rows).correct.tolist()
    assert parts.total.sum() == pytest.approx(len(rows))
