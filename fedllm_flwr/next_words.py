"""What a keyboard needs to know of a chain: the next word among one and three, by language, and latency under load."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedllm_flwr.batching.arrivals import poisson_arrivals, serve_arrivals
from fedllm_flwr.cascade.curves import Walk
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers import Endpoint, LocalMember, Tier, is_right
from fedllm_flwr.tiers.grouped import GroupedMember
from fedllm_flwr.tiers.members import Asking
from fedllm_flwr.tiers.recorded import QUERIES_AT_ONCE

SUGGESTIONS = 3
SIZES = (1, 8, 32)
"""Batches whose CPU seconds are measured; others lie between them."""
REQUESTS = 2000
"""That arrive in virtual time."""


def word_rows(
    tiers: Sequence[Tier], task: Task, rows: Sequence[Row], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """How often the next word is the first, or among the first three, suggestions of each member of each tier.

    The suggestions are the words that greedy decoding makes of the three most probable first tokens. Two of them may be
    the same word.

    Args:
        tiers: Of a chain.
        task: Whose targets are one word.
        rows: Queries with unique names.
        note: Told how far it is.

    Returns:
        Rows of the table ``words``: by tier and member, for each group and for all rows.

    Raises:
        ConfigError: A member is an endpoint: it gives no second guess.
    """
    found = []
    for tier in tiers:
        for name, member in zip(tier.config.names, tier.members, strict=False):
            if isinstance(member, Endpoint):
                raise ConfigError(
                    f"cascade tier {tier.config.name!r}: expected models that suggest several words, got the endpoint "
                    f"{member.name}"
                )
            hits = _hits(member, replace(tier.asking, samples=1, temperature=0.0), task, rows)
            note(
                f"tier {tier.config.name}, {name}: {SUGGESTIONS} suggestions for {len(rows)} queries"
            )
            found += [
                {"table": "words", "tier": tier.config.name, "member": name, **row}
                for row in _by_group(rows, hits)
            ]
    return found


def _hits(
    member: LocalMember | GroupedMember, asking: Asking, task: Task, rows: Sequence[Row]
) -> np.ndarray:
    """Whether each suggestion is right, bool [n, 3]."""
    hits = np.zeros((len(rows), SUGGESTIONS), bool)
    for rank in range(SUGGESTIONS):
        ranked = replace(asking, first_rank=rank)
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = rows[start : start + QUERIES_AT_ONCE]
            replies = member.ask(task, some, ranked)
            for place, (row, own) in enumerate(zip(some, replies, strict=True), start):
                hits[place, rank] = is_right(task, row, own[0].text)
    return hits


def _by_group(rows: Sequence[Row], hits: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for name in (*sorted({str(row.group) for row in rows}), "all"):
        chosen = np.array([name in ("all", str(row.group)) for row in rows])
        found.append(
            {
                "group": name,
                "queries": int(chosen.sum()),
                "top1": float(hits[chosen, 0].mean()),
                "top3": float(hits[chosen].any(axis=1).mean()),
            }
        )
    return found


def batch_costs(tier: Tier, task: Task, rows: Sequence[Row]) -> dict[int, float]:
    """CPU seconds of this process for batches of one, eight and 32 queries; the first call is not measured.

    Args:
        tier: Which.
        task: The queries' task.
        rows: At least as many as the largest batch that is to be measured.
    """
    tier.ask(task, rows[:1])
    found = {}
    for size in (size for size in SIZES if size <= len(rows)):
        began = time.process_time()
        tier.ask(task, rows[:size])
        found[size] = time.process_time() - began
    return found


def arrival_rows(
    walk: Walk,
    first: dict[int, float],
    last: dict[int, float],
    per_second: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Times of queries that arrive at random, with the first tier at the devices and the last one behind a queue.

    A device answers its own query alone; what it defers goes into the server's batches. All in virtual time.

    Args:
        walk: Where each query goes in the cascade, by turns. [Q]
        first: CPU seconds of the first tier by size of the batch; that of one is what a device takes.
        last: The same of the last tier.
        per_second: Of all devices together, above 0.
        seed: Decides the arrivals.

    Returns:
        Rows of the table ``arrivals``, for ``cascade`` and for ``always_last`` under the same arrivals: p50, p95 and
        p99 in seconds, and the share of the server's time that is used.
    """
    arrivals = poisson_arrivals(per_second, REQUESTS, numpy_generator(seed, "keyboard", "arrivals"))
    sizes, costs = list(last), list(last.values())

    def batch_seconds(size: int) -> float:
        return float(np.interp(size, sizes, costs))

    deferred = np.resize(walk.answered > 0, REQUESTS)
    seconds = np.full(REQUESTS, first[1])
    found = []
    busy = 0.0
    if deferred.any():
        served = serve_arrivals(arrivals[deferred] + first[1], batch_seconds)
        seconds[deferred] += served.seconds
        busy = sum(map(batch_seconds, served.sizes)) / served.until
    everything = serve_arrivals(arrivals, batch_seconds)
    whole = sum(map(batch_seconds, everything.sizes)) / everything.until
    for method, times, load in (
        ("cascade", seconds, busy),
        ("always_last", everything.seconds, whole),
    ):
        p50, p95, p99 = np.percentile(times, (50, 95, 99)).tolist()
        found.append(
            {
                "table": "arrivals",
                "method": method,
                "per_second": per_second,
                "server_busy": load,
                "p50_seconds": p50,
                "p95_seconds": p95,
                "p99_seconds": p99,
            }
        )
    return found
