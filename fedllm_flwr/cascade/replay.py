"""Recorded answers through the cascade: one row for each threshold and for each baseline.

Axes: Q queries, T tiers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fedllm_flwr.cascade.accounts import (
    PERCENTILES,
    Price,
    latency_percentiles,
    side_by_side,
    total_cost,
)
from fedllm_flwr.cascade.agreement import levels_of
from fedllm_flwr.cascade.curves import (
    Walk,
    always,
    bootstrap_means,
    cascade,
    matched,
    oracle,
    random_deferral,
)
from fedllm_flwr.cascade.noninferiority import most_lost
from fedllm_flwr.cascade.outcomes import TierOutcomes, tier_outcomes
from fedllm_flwr.cascade.recording import Recording
from fedllm_flwr.cascade.routing import routed
from fedllm_flwr.cascade.signals import (
    aurc,
    deferral_auroc,
    deferral_gain,
    mean_error_correlation,
)
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator

Row = dict[str, Any]
SCORE_STEPS = 10
"""Score deferral is shown at this many quantiles of its levels, and at the least."""


@dataclass(frozen=True)
class Line:
    """A walk under its name.

    Attributes:
        method: Name of the rule.
        theta: Its threshold, the same for every tier; None where it has none.
        walk: Where each query went.
        tiers: What the rule's tiers answer.
    """

    method: str
    theta: float | None
    walk: Walk
    tiers: Sequence[TierOutcomes]


@dataclass(frozen=True, eq=False)
class Beside:
    """What a live chain can add to its recording.

    Attributes:
        samples: k samples of one member to the same queries, as a tier of the first tier's name; None without.
        promised: The router's probability that the first tier is right (:mod:`fedllm_flwr.cascade.routing`). [Q]
        timed: Answers to some of the queries with seconds, asked one by one; the times of all lines are theirs.
    """

    samples: Recording | None = None
    promised: np.ndarray | None = None
    timed: Recording | None = None


NOTHING = Beside()


def replay(
    record: Recording,
    prices: Mapping[str, Price],
    seed: int = 0,
    *,
    thetas: Sequence[float] | None = None,
    parallelism: Mapping[str, float] | None = None,
    beside: Beside = NOTHING,
) -> list[Row]:
    """All rows of a recording.

    Args:
        record: Recorded answers of at least two tiers.
        prices: By tier.
        seed: Decides the bootstrap's draws.
        thetas: One threshold for every tier but the last, chosen elsewhere; their line is ``calibrated``.
        parallelism: ρ of each tier, for ``parallel_cost_per_query``; by default 0, all members at once.
        beside: What a file of answers does not hold.

    Returns:
        Rows of two tables, told apart by ``table``. ``curve``: a line for each threshold and each baseline, with the
        figures of each tier in ``tiers``. ``signals``: a line for each tier. A value that does not exist is None.

    Raises:
        ConfigError: There are fewer than two tiers.
        ShapeError: What stands beside is of other queries.
    """
    if len(record.tiers) < 2:
        raise ConfigError(
            f"cascade: expected answers of at least two tiers, got only {', '.join(record.tiers)}"
        )
    voted = [tier_outcomes(rows, prices[tier]) for tier, rows in record.tiers.items()]
    lines = _lines(record, prices, voted)
    lines += _beside(record, prices, voted, beside)
    if thetas is not None:
        lines.append(Line("calibrated", None, cascade(voted, thetas), voted))
    timed = voted if beside.timed is None else _timed(beside.timed, prices)
    rho = dict.fromkeys(record.tiers, 0.0) | dict(parallelism or {})
    figures = np.column_stack(
        [f for line in lines for f in (line.walk.correct(line.tiers), line.walk.cost(line.tiers))]
    )
    ends = bootstrap_means(figures, numpy_generator(seed, "cascade", "curve"))
    rows = []
    for place, line in enumerate(lines):
        rows.append(_curve_row(line, ends[:, 2 * place : 2 * place + 2], rho))
        if beside.timed is not None:
            rows[-1] |= _latency(_again(line, timed, thetas))
        if line.method == "cascade":
            rows.append(_random_row(line, rho))
    _compare(rows, next(row for row in rows if row["method"] == "always_last"))
    return rows + [_signal_row(tier, voted[-1], record.tiers[tier.tier], seed) for tier in voted]


def _lines(
    record: Recording, prices: Mapping[str, Price], voted: Sequence[TierOutcomes]
) -> list[Line]:
    """Every walk, cascades first."""
    deferring = list(record.tiers)[:-1]
    thetas = sorted({level for tier in voted[:-1] for level in levels_of(tier.members)[1:]})
    steps = len(deferring)
    lines = [Line("cascade", theta, cascade(voted, [theta] * steps), voted) for theta in thetas]
    walks = {line.theta: line.walk for line in lines}
    if all(record.has_scores(tier) for tier in deferring):
        scored = [tier_outcomes(record.tiers[t], prices[t], "score") for t in deferring] + [
            voted[-1]
        ]
        levels = np.concatenate([tier.level[tier.parsed] for tier in scored[:-1]])
        if levels.size:
            shares = np.linspace(0, 1, SCORE_STEPS + 1)
            for theta in np.unique(np.quantile(levels, shares, method="inverted_cdf")).tolist():
                walk = cascade(scored, [theta] * steps)
                lines.append(Line("score_cascade", theta, walk, scored))
        alone = [
            tier_outcomes([row[:1] for row in record.tiers[t]], prices[t], "score")
            for t in deferring
        ]
        single = [*alone, voted[-1]]
        lines += [
            Line("max_score", theta, matched(single, walk), single) for theta, walk in walks.items()
        ]
    return [
        *lines,
        Line("always_first", None, always(voted, 0), voted),
        Line("always_last", None, always(voted, -1), voted),
        Line("oracle", None, oracle(voted), voted),
    ]


def _beside(
    record: Recording,
    prices: Mapping[str, Price],
    voted: Sequence[TierOutcomes],
    beside: Beside,
) -> list[Line]:
    """Self-consistency of one member in place of the first tier, and the router, both over the cascade's thresholds."""
    found = []
    if beside.samples is not None:
        first = next(iter(record.tiers))
        sampled = [tier_outcomes(beside.samples.tiers[first], prices[first]), *voted[1:]]
        found = [
            Line(
                "self_consistency_cascade",
                theta,
                cascade(sampled, [theta] * (len(voted) - 1)),
                sampled,
            )
            for theta in levels_of(sampled[0].members)[1:]
        ]
        found.append(Line("self_consistency", None, always(sampled, 0), sampled))
    if beside.promised is not None:
        for theta in levels_of(voted[0].members)[1:]:
            walk = cascade(voted, [theta] * (len(voted) - 1))
            found.append(Line("router", theta, routed(voted, walk, beside.promised), voted))
    return found


def _timed(record: Recording, prices: Mapping[str, Price]) -> list[TierOutcomes]:
    return [tier_outcomes(rows, prices[tier]) for tier, rows in record.tiers.items()]


def _again(
    line: Line, timed: Sequence[TierOutcomes], thetas: Sequence[float] | None
) -> Line | None:
    """A line's rule over the queries whose time is known; None where it needs more than votes."""
    if line.method == "cascade" and line.theta is not None:
        walk = cascade(timed, [line.theta] * (len(timed) - 1))
    elif line.method == "calibrated" and thetas is not None:
        walk = cascade(timed, thetas)
    elif line.method in ("always_first", "always_last"):
        walk = always(timed, 0 if line.method == "always_first" else -1)
    else:
        return None
    return Line(line.method, line.theta, walk, timed)


def _compare(rows: Sequence[Row], last: Row) -> None:
    """Set costs beside those of the last tier alone: k^ρ·γ + p of two tiers, from tokens that were counted."""
    for row in rows:
        for name in ("cost_per_query", "parallel_cost_per_query"):
            whole = last[name]
            row[f"{name}_ratio"] = row[name] / whole if whole else None


def _curve_row(line: Line, ends: np.ndarray, rho: Mapping[str, float]) -> Row:
    """A walk's row; ``ends`` holds the intervals of accuracy and cost, [2, 2]."""
    tiers, walk = line.tiers, line.walk
    queries, correct = tiers[0].queries, int(walk.correct(tiers).sum())
    tokens = walk.tokens(tiers)
    costs = total_cost(tokens, {tier.tier: tier.price for tier in tiers})
    total = sum(costs.values(), Fraction(0))
    parallel = sum(side_by_side(costs[tier.tier], tier.members, rho[tier.tier]) for tier in tiers)
    details = [
        {**entry, "cost": _plain(costs[entry["tier"]]), "input_tokens": tokens[entry["tier"]][0],
         "output_tokens": tokens[entry["tier"]][1]}
        for entry in _traffic(line)
    ]  # fmt: skip
    return {
        "table": "curve",
        "method": line.method,
        "theta": line.theta,
        "queries": queries,
        "correct": correct,
        "accuracy": correct / queries,
        "accuracy_low": float(ends[0, 0]),
        "accuracy_high": float(ends[1, 0]),
        "most_lost": most_lost(walk.correct(tiers), tiers[-1].correct),
        "deferral_rate": _deferred(line),
        "cost": _plain(total),
        "cost_per_query": _plain(total / queries),
        "cost_per_query_low": float(ends[0, 1]),
        "cost_per_query_high": float(ends[1, 1]),
        "parallel_cost_per_query": parallel / queries,
        **_latency(line),
        "tiers": details,
    }


def _random_row(like: Line, rho: Mapping[str, float]) -> Row:
    """Random deferral at the rates of a cascade: expected values, so no interval and no query's own latency."""
    expected = random_deferral(like.tiers, like.walk)
    queries = like.tiers[0].queries
    details, parallel = [], 0.0
    for entry, tier in zip(_traffic(like), like.tiers, strict=True):
        cost = entry["reached"] * float(tier.cost.mean())
        parallel += side_by_side(cost, tier.members, rho[tier.tier])
        details.append({**entry, "cost": cost, "input_tokens": None, "output_tokens": None})
    return {
        "table": "curve",
        "method": "random",
        "theta": like.theta,
        "queries": queries,
        "correct": expected.accuracy * queries,
        "accuracy": expected.accuracy,
        "accuracy_low": None,
        "accuracy_high": None,
        "most_lost": None,
        "deferral_rate": _deferred(like),
        "cost": expected.cost * queries,
        "cost_per_query": expected.cost,
        "cost_per_query_low": None,
        "cost_per_query_high": None,
        "parallel_cost_per_query": parallel / queries,
        **dict.fromkeys(_LATENCY),
        "tiers": details,
    }


def _deferred(line: Line) -> float:
    """Share of the queries that the first tier did not answer."""
    return int((line.walk.answered > 0).sum()) / line.tiers[0].queries


def _traffic(line: Line) -> list[Row]:
    """For each tier: queries that called it, that it answered, and the share that it deferred of those that called."""
    reached = line.walk.reached().tolist()
    answered = np.bincount(line.walk.answered, minlength=len(line.tiers)).tolist()
    return [
        {"tier": tier.tier, "reached": called, "answered": given,
         "deferral_rate": (called - given) / called if called else None}
        for tier, called, given in zip(line.tiers, reached, answered, strict=True)
    ]  # fmt: skip


_LATENCY = [
    f"p{percent}_{kind}_seconds" for kind in ("serial", "parallel") for percent in PERCENTILES
]


def _latency(line: Line | None) -> Row:
    found: Row = dict.fromkeys(_LATENCY)
    if line is None:
        return found
    for kind in ("serial", "parallel"):
        seconds = line.walk.seconds(line.tiers, parallel=kind == "parallel")
        if seconds is not None:
            for percent, value in latency_percentiles(seconds).items():
                found[f"p{percent}_{kind}_seconds"] = value
    return found


def _signal_row(
    tier: TierOutcomes, last: TierOutcomes, answers: Sequence[Sequence[Any]], seed: int
) -> Row:
    generator = numpy_generator(seed, "cascade", "auroc", tier.tier)
    ranking = deferral_auroc(tier.level, tier.correct, generator)
    members = np.array([[answer.correct for answer in row] for row in answers])
    gain = None if tier is last else deferral_gain(tier.level, tier.correct, last.correct)
    found: Row = {
        "table": "signals",
        "tier": tier.tier,
        "members": tier.members,
        "accuracy": int(tier.correct.sum()) / tier.queries,
        "unparsed": int(tier.queries - tier.parsed.sum()),
        "auroc": ranking.value,
        "auroc_low": ranking.low,
        "auroc_high": ranking.high,
        "aurc": aurc(tier.level, tier.correct),
        "deferral_gain": gain,
        "error_correlation": mean_error_correlation(members),
    }
    return {name: None if value != value else value for name, value in found.items()}


def _plain(amount: Fraction) -> int | float:
    """An exact amount as JSON has it: an integer where it is one, else the nearest float."""
    return int(amount) if amount.denominator == 1 else float(amount)
