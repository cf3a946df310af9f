"""Fairness figures of a model from its groups' sums, and how sure they are.

A minimum over groups takes the unluckiest, and tiny groups are the unluckiest: a group with fewer than
``LEAST_ROWS`` rows is reported, but neither the worst, the best nor the gap is read off it. Wilson's interval of one
group's accuracy is that of `fedllm_flwr.tasks.metrics.Counts`; the intervals here are for figures over several groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.fairness.sums import GroupSums, pool, present

LEAST_ROWS = 50
"""Rows from which on a group may be the worst: with 50 rows, a 95 % interval is at most 0.27 wide."""

Figure = Callable[[Mapping[str, GroupSums]], float]


@dataclass(frozen=True)
class GroupFigures:
    """What a model does for groups.

    Attributes:
        groups: Sums of every group that has rows, sorted by name.
        small: Groups that are too small to be the worst or the best.
        worst_group: The counted group of the lowest accuracy, the first by name among equals; empty if none counts.
        accuracy: Over all rows of all groups, small ones too; NaN without rows.
        worst_accuracy: Accuracy of the worst group; NaN if none counts.
        gap: Highest minus lowest accuracy of the counted groups; NaN if none counts.
        worst_loss: Largest mean loss of a counted group, in nats; NaN if none counts.
    """

    groups: Mapping[str, GroupSums]
    small: tuple[str, ...]
    worst_group: str
    accuracy: float
    worst_accuracy: float
    gap: float
    worst_loss: float


def group_figures(sums: Mapping[str, GroupSums], least_rows: int = LEAST_ROWS) -> GroupFigures:
    """The figures of one model.

    Args:
        sums: Sums by group, as a rule over test rows.
        least_rows: Rows that a group needs to count, >= 1.
    """
    groups = dict(sorted(present(sums).items()))
    counted = present(groups, least_rows)
    worst = min(counted, key=lambda group: counted[group].accuracy, default="")
    return GroupFigures(
        groups=groups,
        small=tuple(group for group in groups if group not in counted),
        worst_group=worst,
        accuracy=sum(groups.values(), GroupSums()).accuracy,
        worst_accuracy=worst_accuracy(counted),
        gap=accuracy_gap(counted),
        worst_loss=max((value.mean_loss for value in counted.values()), default=math.nan),
    )


def worst_accuracy(sums: Mapping[str, GroupSums]) -> float:
    """Lowest accuracy of the groups that have rows; NaN when none has."""
    return min((value.accuracy for value in present(sums).values()), default=math.nan)


def accuracy_gap(sums: Mapping[str, GroupSums]) -> float:
    """Highest minus lowest accuracy of the groups that have rows; NaN when none has."""
    found = [value.accuracy for value in present(sums).values()]
    return max(found) - min(found) if found else math.nan


def bootstrap(
    units: Sequence[Mapping[str, GroupSums]],
    figure: Figure,
    random: np.random.Generator,
    *,
    least_rows: int = LEAST_ROWS,
    draws: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a figure when the units had been others of their kind.

    Args:
        units: Sums by group of each unit that was sampled as a whole: a client, a document or, where rows are
            independent, a row.
        figure: From sums by group to a number, for example :func:`worst_accuracy`.
        random: Draws the units.
        least_rows: Groups with fewer rows over all units are left out of every draw, >= 1.
        draws: Resamples, >= 1; draws in which the figure is NaN are left out.
        confidence: Two-sided coverage, in (0, 1).

    Returns:
        Lower and upper end; NaN twice when the figure is NaN in every draw.

    Raises:
        ConfigError: There are no units, no draws, or the confidence is out of range.

    Source:
        Efron 1979, Bootstrap methods; the cluster form of Davison and Hinkley 1997, section 3.8. It is not corrected
        for the bias of a minimum, whose resamples lie a little too low.
    """
    if not units or draws < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"bootstrap: expected units, draws >= 1 and confidence in (0, 1), got {len(units)} "
            f"units, {draws} draws, confidence {confidence}"
        )
    names = list(present(pool(units), least_rows))
    table = np.array([[_cells(unit.get(name)) for name in names] for unit in units], dtype=float)
    table = table.reshape(len(units), 3 * len(names))
    even = np.full(len(units), 1 / len(units))
    found = []
    for _ in range(draws):
        sums = (random.multinomial(len(units), even) @ table).reshape(len(names), 3)
        drawn = zip(names, sums, strict=True)
        value = figure({name: GroupSums(s, round(c), round(t)) for name, (s, c, t) in drawn})
        if not math.isnan(value):
            found.append(value)
    if not found:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _cells(sums: GroupSums | None) -> tuple[float, int, int]:
    return (0.0, 0, 0) if sums is None else (sums.loss_sum, sums.correct, sums.total)
