from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.cascade import recording, replay
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tiers import Chain, is_right, record_lines

Fixture = Callable[..., Any]


def test_a_chain_does_what_the_replay_of_its_recording_says(task: Task, tier: Fixture) -> None:
    """Accuracy, deferral and cost of the walk that asks only whom it must equal those of the full grid."""
    tiers = (tier("a", 1, 2, 3, price_in=0.1, price_out=0.2), tier("b", 4, 5), tier("c", 6))
    rows = task.splits["test"]
    lines = list(enumerate(record_lines(tiers, task, rows), start=1))
    prices = {own.config.name: own.price for own in tiers}
    curve = [row for row in replay(recording(lines, "x"), prices) if row.get("method") == "cascade"]
    assert len(curve) > 2
    for line in curve:
        found = Chain(tiers, (line["theta"],) * 2).answer(task, rows)
        right = [is_right(task, row, own.text) for row, own in zip(rows, found, strict=True)]
        assert sum(right) == line["correct"]
        assert float(sum(own.cost for own in found)) == pytest.approx(line["cost"], rel=1e-12)
        answered = [sum(own.tier == name for own in found) for name in prices]
        assert answered == [entry["answered"] for entry in line["tiers"]]


def test_a_query_costs_at_least_what_the_first_tier_does(task: Task, tier: Fixture) -> None:
    tiers = (tier("a", 1, 2), tier("b", 3))
    rows = task.splits["test"]
    alone = Chain(tiers[:1], ()).answer(task, rows)
    for theta in (0.0, 1.0):
        for own, first in zip(Chain(tiers, (theta,)).answer(task, rows), alone, strict=True):
            assert own.cost >= first.cost
            assert own.tokens[0] == first.tokens[0]


def test_a_tier_that_no_query_reaches_is_not_asked(task: Task, tier: Fixture) -> None:
    found = Chain((tier("a", 1), tier("b", 2)), (0.0,)).answer(task, task.splits["test"])
    assert {own.tier for own in found} == {"a"}
    assert all(len(own.tokens) == 1 for own in found)


def test_thresholds_fit_the_tiers(tier: Fixture) -> None:
    with pytest.raises(ConfigError, match="a threshold for every tier but the last, got 0 for 2"):
        Chain((tier("a", 1), tier("b", 2)), ())
