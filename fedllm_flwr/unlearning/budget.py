"""How many queries a verdict needs, and how many it has used.

A query is one example, prompt or continuation put to the model under test. The same queries put to full, retrained and
control models are not counted again: an attacker has only the one model.
"""

import math

from scipy import stats

from fedllm_flwr.errors import ConfigError

ATTACKABLE = 0.7
"""AUC of the full model below which there is nothing to verify: it never remembered."""

MARGIN = 0.05
"""Largest difference of AUC that counts as none."""

POWER = 0.9
"""Probability with which a model as attackable as that must be told from a retrained one."""

ALPHA = 0.05
"""Probability with which each side of an equivalence test may be wrong."""

DEFAULT_BUDGET = 1000

LEAST_ROOM = 1e-3
"""Least distance of an attackable AUC from 0.5 and the margin."""


def auc_standard_error(area: float, members: int, others: int) -> float:
    """Standard error of an AUC over the draw of its examples.

    Models that differ by their seed alone are tried on the same examples, so their AUCs differ by less than this.

    Args:
        area: The AUC, in [0, 1].
        members: Examples of one kind, >= 1.
        others: Of the other, >= 1.

    Raises:
        ConfigError: An argument is out of range.

    Source:
        Hanley and McNeil 1982, Eq. 1 and 2 (scores of negative exponential form, which is near others as well).
    """
    if not 0 <= area <= 1 or members < 1 or others < 1:
        raise ConfigError(
            f"AUC: expected an area in [0, 1] and examples >= 1, got {area}, {members} and {others}"
        )
    both_above, both_below = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area)
        + (members - 1) * (both_above - area**2)
        + (others - 1) * (both_below - area**2)
    ) / (members * others)
    return math.sqrt(max(variance, 0.0))


def least_queries(
    *,
    attackable: float = ATTACKABLE,
    margin: float = MARGIN,
    power: float = POWER,
    alpha: float = ALPHA,
) -> int:
    """Queries of membership inference that tell a model that remembers from one that does not.

    With n members and n others it is the least 2 n with

        z(1 - alpha) · SE(0.5, n) + z(power) · SE(attackable, n) <= attackable - 0.5 - margin,

    where SE is :func:`auc_standard_error`: a test that calls a difference beyond the margin a failure then finds a
    model of that AUC with that power.

    Raises:
        ConfigError: An argument is out of range, or the margin leaves no room between 0.5 and the AUC.
    """
    room = attackable - 0.5 - margin  # a hair of it would ask for billions of queries
    if (
        not 0 < attackable < 1
        or not 0 < alpha < 0.5 <= power < 1
        or margin < 0
        or room < LEAST_ROOM
    ):
        raise ConfigError(
            f"queries: expected alpha in (0, 0.5), power in [0.5, 1) and 0.5 + margin < AUC < 1, "
            f"got {alpha}, {power}, {margin} and {attackable}"
        )
    at_chance, at_power = float(stats.norm.ppf(1 - alpha)), float(stats.norm.ppf(power))

    def needed(n: int) -> float:
        chance, remembered = auc_standard_error(0.5, n, n), auc_standard_error(attackable, n, n)
        return at_chance * chance + at_power * remembered

    most = 2
    while needed(most) > room:
        most *= 2
    least = next(n for n in range(most // 2, most + 1) if needed(n) <= room)
    return 2 * least


class QueryBudget:
    """Counts queries check by check, and stops before more are asked than were allowed."""

    def __init__(self, limit: int = DEFAULT_BUDGET, *, least: int | None = None) -> None:
        """Open a budget.

        Args:
            limit: Queries in all.
            least: Queries without which the verdict has no power; by default :func:`least_queries`.

        Raises:
            ConfigError: The limit is below that; says how many are needed.
        """
        needed = least_queries() if least is None else least
        if limit < needed:
            raise ConfigError(
                f"query budget: expected at least {needed} queries for a power of {POWER} against an AUC of "
                f"{ATTACKABLE} at a margin of {MARGIN}, got {limit}"
            )
        self.limit = limit
        self._spent: dict[str, int] = {}

    @property
    def spent(self) -> dict[str, int]:
        """Queries of each check so far, in the order of their first."""
        return dict(self._spent)

    @property
    def left(self) -> int:
        """Queries that may still be asked."""
        return self.limit - sum(self._spent.values())

    def spend(self, check: str, queries: int) -> None:
        """Count queries before they are asked.

        Args:
            check: Who asks.
            queries: How many, >= 0.

        Raises:
            ConfigError: There are not so many left; nothing is counted.
        """
        if not 0 <= queries <= self.left:
            raise ConfigError(
                f"query budget: {check}: expected 0 to {self.left} more queries of {self.limit}, got {queries}"
            )
        self._spent[check] = self._spent.get(check, 0) + queries
