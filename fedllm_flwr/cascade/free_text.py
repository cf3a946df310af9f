"""Free texts through a cascade: similarity of the members' answers decides, and quality is a grade and not a label.

Axes: Q queries, k members of a tier.

Source:
    Soiffer, Kolawole and Smith 2025, Semantic agreement cascades (arXiv 2509.21837).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fedllm_flwr.cascade.accounts import Price, total_cost
from fedllm_flwr.cascade.contradictions import judged
from fedllm_flwr.cascade.curves import (
    Walk,
    always,
    bootstrap_means,
    cascade,
    matched,
    random_deferral,
)
from fedllm_flwr.cascade.outcomes import TierOutcomes
from fedllm_flwr.cascade.quality import bootstrapped_gain
from fedllm_flwr.cascade.semantic import Similarity, semantic_agreement
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator

STEPS = 10
"""The cascade is shown at this many quantiles of its levels, and at the least."""
ACCEPTED = (0.5, 0.75, 0.9)
"""Shares of the queries whose thresholds contradictions are held against."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """One member's text for one query.

    Attributes:
        text: The text; None where nothing was written.
        quality: In [0, 1], by a measure that is not the similarity which decides.
        input_tokens: Read.
        output_tokens: Written.
        score: The geometric mean of its tokens' probabilities; None if not known.
    """

    text: str | None
    quality: float
    input_tokens: int
    output_tokens: int
    score: float | None = None


Answers = Sequence[Sequence[Written]]
"""For each query, of every member. [Q][k]"""


def graded(tier: str, answers: Answers, price: Price, similarity: Similarity) -> TierOutcomes:
    """A tier whose level is the members' mean similarity and whose answer is the medoid; ``correct`` holds its quality.

    A tier of one member agrees with itself: its level is 1 where it has written something.
    """
    levels, places = [], []
    for row in answers:
        if len(row) < 2:
            levels.append(float(bool(row[0].text)))
            places.append(0)
            continue
        found = semantic_agreement([own.text for own in row], similarity)
        levels.append(found.level)
        places.append(found.medoid)
    chosen = [row[place] for row, place in zip(answers, places, strict=True)]
    return _outcomes(tier, answers, price, np.array(levels), chosen)


def alone(tier: str, answers: Answers, price: Price) -> TierOutcomes | None:
    """The first member by itself, with its score for a level; None if scores are not known."""
    first = [row[0] for row in answers]
    scores = [own.score for own in first if own.score is not None]
    if len(scores) < len(first):
        return None
    return _outcomes(tier, [[own] for own in first], price, np.array(scores), first)


def _outcomes(
    tier: str, answers: Answers, price: Price, levels: np.ndarray, chosen: Sequence[Written]
) -> TierOutcomes:
    return TierOutcomes(
        tier=tier,
        members=len(answers[0]),
        level=levels,
        parsed=np.array([bool(own.text) for own in chosen]),
        correct=np.array([own.quality for own in chosen], np.float64),
        input_tokens=np.array([sum(own.input_tokens for own in row) for row in answers], np.int64),
        output_tokens=np.array([sum(own.output_tokens for own in row) for row in answers], np.int64),
        price=price,
    )  # fmt: skip


def free_text_rows(
    answers: Mapping[str, Answers],
    prices: Mapping[str, Price],
    similarity: Similarity,
    seed: int = 0,
) -> list[Row]:
    """Quality and cost over the threshold, what the signals are worth, and what they take for agreement.

    Args:
        answers: By tier, from the first to the last; of the same queries.
        prices: By tier.
        similarity: Decides.
        seed: Decides the bootstrap's draws.

    Returns:
        Rows of three tables. ``curve``: ``semantic`` at quantiles of its levels, beside each of them ``random``
        (expected values) and ``log_probability`` (one member's mean token log-probability) at the same rate of
        deferral, then ``always_first``, ``one_member`` and ``always_last``. ``signals``: the gain of each signal
        between random (0) and perfect (1) deferral to the last tier. ``contradictions``: accepted pairs at thresholds
        that accept a half, three quarters and nine tenths of the queries.

    Raises:
        ConfigError: There are fewer than two tiers, or the first has one member only.
        ShapeError: The tiers are of different queries.
    """
    names = list(answers)
    if len(names) < 2 or len(answers[names[0]][0]) < 2:
        raise ConfigError(
            "semantic cascade: expected two tiers or more, the first with two members or more, got "
            f"{', '.join(f'{name} of {len(answers[name][0])}' for name in names)}"
        )
    tiers = [graded(name, answers[name], prices[name], similarity) for name in names]
    single = alone(names[0], answers[names[0]], prices[names[0]])
    lines = _lines(tiers, single)
    columns = [
        f for line in lines for f in (line.walk.correct(line.tiers), line.walk.cost(line.tiers))
    ]
    ends = bootstrap_means(np.column_stack(columns), numpy_generator(seed, "semantic", "curve"))
    rows: list[Row] = []
    for place, line in enumerate(lines):
        rows.append(_row(line, ends[:, 2 * place]))
        if line.method == "semantic":
            rows.append(_random(rows[-1], line))
    whole = next(row["cost_per_query"] for row in rows if row["method"] == "always_last")
    for row in rows:
        row["cost_per_query_ratio"] = row["cost_per_query"] / whole if whole else None
    rows += _signals(tiers, single, similarity.name, seed)
    accepting = np.quantile(tiers[0].level, [1 - share for share in ACCEPTED]).tolist()
    return rows + [
        {"table": "contradictions", "similarity": similarity.name, "accepted": share, **row}
        for share, row in zip(ACCEPTED, judged(similarity, accepting), strict=True)
    ]


@dataclass(frozen=True)
class _Line:
    """A walk under the name of its rule."""

    method: str
    theta: float | None
    walk: Walk
    tiers: Sequence[TierOutcomes]


def _lines(tiers: Sequence[TierOutcomes], single: TierOutcomes | None) -> list[_Line]:
    shares = np.linspace(0, 1, STEPS + 1)
    lines = []
    for theta in np.unique(np.quantile(tiers[0].level, shares, method="inverted_cdf")).tolist():
        walk = cascade(tiers, [theta] * (len(tiers) - 1))
        lines.append(_Line("semantic", theta, walk, tiers))
        if single is not None:
            beside = [single, *tiers[1:]]
            lines.append(_Line("log_probability", theta, matched(beside, walk), beside))
    lines.append(_Line("always_first", None, always(tiers, 0), tiers))
    lines.append(_Line("always_last", None, always(tiers, -1), tiers))
    if single is not None:
        beside = [single, *tiers[1:]]
        lines.append(_Line("one_member", None, always(beside, 0), beside))
    return lines


def _signals(
    tiers: Sequence[TierOutcomes], single: TierOutcomes | None, similarity: str, seed: int
) -> list[Row]:
    signals = {f"semantic {similarity}": tiers[0]}
    if single is not None:
        signals["log_probability"] = single
    rows = []
    for name, tier in signals.items():
        generator = numpy_generator(seed, "semantic", name)
        gain = bootstrapped_gain(tier.level, tier.correct, tiers[-1].correct, generator)
        figures = {"deferral_gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        rows.append({"table": "signals", "signal": name, "quality": float(tier.correct.mean()),
                     **{key: None if value != value else value for key, value in figures.items()}})  # fmt: skip
    return rows


def _row(line: _Line, ends: np.ndarray) -> Row:
    """A walk's row; ``ends`` holds the interval of its quality, [2]."""
    walk, tiers, queries = line.walk, line.tiers, line.tiers[0].queries
    costs = total_cost(walk.tokens(tiers), {tier.tier: tier.price for tier in tiers})
    total = sum(costs.values(), Fraction(0))
    return {
        "table": "curve",
        "method": line.method,
        "theta": line.theta,
        "quality": float(walk.correct(tiers).mean()),
        "quality_low": float(ends[0]),
        "quality_high": float(ends[1]),
        "deferral_rate": int((walk.answered > 0).sum()) / queries,
        "cost": float(total),
        "cost_per_query": float(total / queries),
    }


def _random(like: Row, line: _Line) -> Row:
    """Random deferral at the same rates: expected values, so no interval."""
    expected = random_deferral(line.tiers, line.walk)
    return {
        **like,
        "method": "random",
        "quality": expected.accuracy,
        "quality_low": None,
        "quality_high": None,
        "cost": expected.cost * line.tiers[0].queries,
        "cost_per_query": expected.cost,
    }
