"""From which agreement on the tiers of a chain answer, from queries that they are not judged on.

Axes: Q queries, k members of a tier.
"""

from collections.abc import Sequence

import numpy as np

from fedllm_flwr.cascade import (
    Calibrated,
    Histogram,
    Recording,
    histogram,
    levels_of,
    majority_is_right,
    solve,
    tier_outcomes,
)
from fedllm_flwr.cascade.accounts import TOKENS
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers.tier import Tier, agreement, is_right


def calibrated_thetas(record: Recording, config: CascadeConfig) -> tuple[Calibrated, ...]:
    """A threshold for every tier but the last, each from the queries that the tiers before it have deferred.

    Args:
        record: Answers of these tiers to held-out queries.
        config: Risk and confidence.

    Returns:
        In the order of the tiers. The confidence holds for each of them, not for all together.
    """
    names = [tier.name for tier in config.tiers[:-1]]
    reached = np.ones(len(record.queries), dtype=bool)
    found = []
    for name in names:
        tier = tier_outcomes(record.tiers[name], TOKENS)
        counts = histogram(tier.level[reached], tier.correct[reached], levels_of(tier.members))
        solved = solve(counts, config.risk, config.confidence, config.among)
        reached &= ~tier.accepts(solved.theta)
        found.append(solved)
    return tuple(found)


def tier_histogram(tier: Tier, task: Task, rows: Sequence[Row]) -> Histogram:
    """How many queries a tier answers at each agreement, and how many of them rightly.

    Args:
        tier: Of k members, so there are k + 1 bins.
        task: The queries' task.
        rows: Queries with their labels; none give zeros.

    Raises:
        FedLLMError: See :meth:`fedllm_flwr.tiers.tier.Tier.ask`.
    """
    replies = tier.ask(task, rows)
    agreed = [agreement(own) for own in replies]
    right = [
        majority_is_right(found, [is_right(task, row, reply.text) for reply in own])
        for row, own, found in zip(rows, replies, agreed, strict=True)
    ]
    levels = np.array([found.level for found in agreed], dtype=np.float64)
    return histogram(levels, np.array(right, dtype=bool), levels_of(tier.config.size))
