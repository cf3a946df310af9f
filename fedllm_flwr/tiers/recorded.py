"""Every member's answer to every query, in the form that a replay reads."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers.members import Reply
from fedllm_flwr.tiers.tier import Tier, record

QUERIES_AT_ONCE = 64
"""Queries between two lines of progress."""


def record_lines(
    tiers: Sequence[Tier],
    task: Task,
    rows: Sequence[Row],
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Mapping[str, Any]]:
    """Ask everybody everything: curves need what tiers would have answered that a cascade never asks.

    Args:
        tiers: From the first to the last.
        task: The queries' task.
        rows: Queries with unique names.
        progress: Told how far it is.

    Yields:
        A record for each query, tier and member, tier after tier.

    Raises:
        FedLLMError: See :meth:`fedllm_flwr.tiers.tier.Tier.ask`.
    """
    for tier in tiers:
        name = tier.config.name
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = rows[start : start + QUERIES_AT_ONCE]
            for row, replies in zip(some, tier.ask(task, some), strict=True):
                for member, reply in zip(tier.config.names, replies, strict=True):
                    yield record(task, row, name, member, reply)
            progress(f"tier {name}: {start + len(some)} of {len(rows)} queries")


def timed_lines(
    tiers: Sequence[Tier],
    task: Task,
    rows: Sequence[Row],
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Mapping[str, Any]]:
    """The same for queries that come alone, one after the other, with what each call takes.

    Args:
        tiers: From the first to the last.
        task: The queries' task.
        rows: Queries with unique names. The first is asked once beforehand, untimed: that loads the models.
        progress: Told how far it is.

    Yields:
        Records with ``seconds``. k samples come from one call, whose time stands at the first of them.

    Raises:
        FedLLMError: See :meth:`fedllm_flwr.tiers.tier.Tier.ask`.
    """
    for tier in tiers:
        name = tier.config.name
        tier.ask(task, rows[:1])
        for row in rows:
            replies: list[tuple[Reply, float]] = []
            for member in tier.members:
                began = time.perf_counter()
                (own,) = member.ask(task, [row], tier.asking)
                seconds = time.perf_counter() - began
                replies += [(reply, 0.0 if place else seconds) for place, reply in enumerate(own)]
            for member_name, (reply, seconds) in zip(tier.config.names, replies, strict=True):
                yield {**record(task, row, name, member_name, reply), "seconds": seconds}
        progress(f"tier {name}: {len(rows)} queries timed")
