"""Quality against cost of a cascade over its thresholds, and of what it has to beat.

Every line is the same walk: which tiers does a query pay for, and whose answer does it get. So no line can leave out
the cost of a tier that it used.

Axes: Q queries, T tiers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.cascade.outcomes import TierOutcomes
from fedllm_flwr.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Walk:
    """Where each query went.

    Attributes:
        paid: Which tiers each query called. bool [Q, T]
        answered: Which tier's answer it got. int64 [Q]
    """

    paid: np.ndarray
    answered: np.ndarray

    def correct(self, tiers: Sequence[TierOutcomes]) -> np.ndarray:
        """Whether each query was answered rightly, bool [Q]."""
        right = np.stack([tier.correct for tier in tiers], axis=1)
        found: np.ndarray = right[np.arange(self.answered.size), self.answered]
        return found

    def cost(self, tiers: Sequence[TierOutcomes]) -> np.ndarray:
        """What each query cost, every member of every tier that it called, float64 [Q]."""
        found: np.ndarray = (np.stack([tier.cost for tier in tiers], axis=1) * self.paid).sum(
            axis=1
        )
        return found

    def tokens(self, tiers: Sequence[TierOutcomes]) -> dict[str, tuple[int, int]]:
        """Tokens read and written in each tier."""
        return {
            tier.tier: (
                int(tier.input_tokens[self.paid[:, place]].sum()),
                int(tier.output_tokens[self.paid[:, place]].sum()),
            )
            for place, tier in enumerate(tiers)
        }

    def reached(self) -> np.ndarray:
        """Queries that called each tier, int64 [T]."""
        found: np.ndarray = self.paid.sum(axis=0)
        return found

    def seconds(self, tiers: Sequence[TierOutcomes], *, parallel: bool) -> np.ndarray | None:
        """Time of each query, tiers one after the other; None unless every tier's is recorded.

        Args:
            tiers: All of them.
            parallel: Whether the members of a tier run at once.
        """
        times = [tier.parallel_seconds if parallel else tier.serial_seconds for tier in tiers]
        known = [time for time in times if time is not None]
        if len(known) < len(tiers):
            return None
        found: np.ndarray = (np.stack(known, axis=1) * self.paid).sum(axis=1)
        return found


def check_tiers(tiers: Sequence[TierOutcomes]) -> None:
    """Check that there are tiers, and that they are of the same queries.

    Raises:
        ShapeError: They are not.
    """
    sizes = {tier.queries for tier in tiers}
    if len(sizes) != 1:
        raise ShapeError(f"cascade: expected tiers of the same queries, got {sorted(sizes)}")


def cascade(tiers: Sequence[TierOutcomes], thetas: Sequence[float]) -> Walk:
    """Ask one tier after the other until one accepts; the last always answers.

    Args:
        tiers: From the first to the last, of the same queries.
        thetas: Threshold of every tier but the last. [T - 1]

    Raises:
        ShapeError: The tiers are not of the same queries, or there is not a threshold for every tier but the last.
    """
    check_tiers(tiers)
    if len(thetas) != len(tiers) - 1:
        raise ShapeError(
            f"cascade: expected {len(tiers) - 1} thresholds for {len(tiers)} tiers, got {len(thetas)}"
        )
    accepts = [tier.accepts(theta) for tier, theta in zip(tiers, thetas, strict=False)]
    return _walk([*accepts, np.ones(tiers[0].queries, bool)])


def matched(tiers: Sequence[TierOutcomes], like: Walk) -> Walk:
    """The same share deferred by every tier as on another walk, but by these tiers' own levels.

    Args:
        tiers: With another signal, such as one member's own score; of the same queries.
        like: The walk whose rates are taken.

    Returns:
        Of the queries that reach a tier those with the lowest levels are deferred, answers that could not be parsed
        first; among equals those that stand first.
    """
    check_tiers(tiers)
    reached, total = like.reached(), tiers[0].queries
    here, accepts = np.ones(total, bool), []
    for place, tier in enumerate(tiers[:-1]):
        order = np.argsort(np.where(tier.parsed, tier.level, -np.inf), kind="stable")
        deferred = np.zeros(total, bool)
        deferred[order[here[order]][: int(reached[place + 1])]] = True
        accepts.append(~deferred)
        here = deferred
    return _walk([*accepts, np.ones(total, bool)])


def always(tiers: Sequence[TierOutcomes], place: int) -> Walk:
    """Every query to one tier and to no other.

    Args:
        tiers: All of them.
        place: Of the tier; -1 is the last.
    """
    check_tiers(tiers)
    return _routed(np.full(tiers[0].queries, place % len(tiers)), len(tiers))


def oracle(tiers: Sequence[TierOutcomes]) -> Walk:
    """A router that knows who is right: to the first tier of the chain that is, else to the last, and to no other.

    No router and no cascade over these tiers answers more queries rightly.
    """
    check_tiers(tiers)
    right = np.stack([tier.correct for tier in tiers], axis=1)
    right[:, -1] = True
    return _routed(np.argmax(right, axis=1), len(tiers))


@dataclass(frozen=True)
class Expected:
    """What random deferral gives on average.

    Attributes:
        accuracy: In [0, 1].
        cost: Of a query.
    """

    accuracy: float
    cost: float


def random_deferral(tiers: Sequence[TierOutcomes], like: Walk) -> Expected:
    """Deferral at the same rates, but without looking at the query: its expected value in closed form.

    Args:
        tiers: Of the same queries as the walk.
        like: The walk whose rates are taken.

    Returns:
        Σ_t P(answered by t) · accuracy_t and Σ_t P(t called) · mean cost_t.
    """
    check_tiers(tiers)
    called = like.reached() / tiers[0].queries
    answered = np.bincount(like.answered, minlength=len(tiers)) / tiers[0].queries
    accuracy = sum(
        float(share) * float(tier.correct.mean())
        for share, tier in zip(answered, tiers, strict=True)
    )
    cost = sum(
        float(share) * float(tier.cost.mean()) for share, tier in zip(called, tiers, strict=True)
    )
    return Expected(accuracy, cost)


def bootstrap_means(
    values: np.ndarray,
    generator: np.random.Generator,
    confidence: float = 0.95,
    replicates: int = 1000,
) -> np.ndarray:
    """Percentile intervals of means over queries; the queries are drawn anew, the same for every column.

    Args:
        values: One column for each figure. [Q, columns]
        generator: Draws the queries.
        confidence: Two-sided coverage, in (0, 1).
        replicates: Times that Q queries are drawn.

    Returns:
        Lower and upper end of each column. [2, columns]

    Source:
        Efron 1979, the bootstrap; percentile interval.
    """
    wide = values.astype(np.float64)
    means = np.concatenate(
        [counts @ wide / len(wide) for counts in resampled(len(wide), generator, replicates)]
    )
    tail = (1 - confidence) / 2
    found: np.ndarray = np.quantile(means, [tail, 1 - tail], axis=0)
    return found


CHUNK = 2**20
"""Drawn numbers that are held at once."""


def resampled(
    queries: int, generator: np.random.Generator, replicates: int
) -> Iterator[np.ndarray]:
    """How often each query is in each of the bootstrap's samples.

    Args:
        queries: Q.
        generator: Draws them.
        replicates: R.

    Yields:
        Parts that have R rows together. [part of R, Q]
    """
    rows = max(1, min(replicates, CHUNK // queries))
    for start in range(0, replicates, rows):
        here = min(rows, replicates - start)
        drawn = generator.integers(0, queries, (here, queries)) + queries * np.arange(here)[:, None]
        yield np.bincount(drawn.ravel(), minlength=here * queries).reshape(here, queries)


def _walk(accepts: Sequence[np.ndarray]) -> Walk:
    accepted = np.stack(accepts, axis=1)
    answered = np.argmax(accepted, axis=1)
    return Walk(np.arange(len(accepts)) <= answered[:, None], answered)


def _routed(answered: np.ndarray, tiers: int) -> Walk:
    return Walk(np.arange(tiers) == answered[:, None], answered)
