"""Objectives whose multipliers are penalties for broken constraints: bounded group loss and the accuracy gap.

Axes: n_g = rows of a group, N = Σ n_g, r_g = mean loss of a group in nats, err_g = its share of wrong answers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.fairness.objectives import Multipliers, Objective, require, with_rows
from fedllm_flwr.fairness.simplex import project_capped
from fedllm_flwr.fairness.sums import GroupSums, present


@dataclass(frozen=True)
class Penalties(Objective):
    """Multipliers are penalties λ_g >= 0 with Σ λ_g <= ``budget`` and the loss is F(w) + Σ λ_g r_g(w).

    A row weighs (1 + λ_g · N / n_g) / (1 + Σ λ_g). The divisor changes no minimiser, so neither the saddle point nor
    its multipliers. A new group joins with 0. Without rows a group's penalty stays and binds its part of the budget.

    Attributes:
        step: η of the ascent, > 0.
        budget: Largest sum of all penalties (B), > 0. Where the ascent ends on it, the constraint may be out of reach.
    """

    step: float = 0.1
    budget: float = 10.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: The step or the budget is not a positive number.
        """
        who = type(self).__name__
        require(0 < self.step < np.inf, f"{who}.step: expected > 0", self.step)
        require(0 < self.budget < np.inf, f"{who}.budget: expected > 0", self.budget)

    def join(self, state: Multipliers, groups: Iterable[str]) -> dict[str, float]:
        """See `Objective.join`: a neutral multiplier is 0."""
        return {group: state.get(group, 0.0) for group in sorted({*state, *groups})}

    def row_weights(self, state: Multipliers, counts: Mapping[str, int]) -> dict[str, float]:
        """See `Objective.row_weights`; no weight is below 1 / (1 + Σ λ), so no group's loss is ever rewarded."""
        rows = with_rows(counts)
        total = sum(rows.values())
        penalties = {group: state.get(group, 0.0) for group in rows}
        scale = 1 + sum(penalties.values())
        return {g: (1 + penalties[g] * total / count) / scale for g, count in rows.items()}

    def update(self, state: Multipliers, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """See `Objective.update`: λ_g ← project(λ_g - η · slack_g)."""
        penalties = self.join(state, sums)
        slack = self.slack(sums)
        if slack:
            room = self.budget - sum(v for group, v in penalties.items() if group not in slack)
            raised = np.array([penalties[g] - self.step * value for g, value in slack.items()])
            penalties |= zip(slack, project_capped(raised, max(room, 0.0)).tolist(), strict=True)
        return penalties


@dataclass(frozen=True)
class BoundedLoss(Penalties):
    """Bounded group loss: min F(w) subject to r_g(w) <= ζ for every group. It bounds losses, not gaps.

    Attributes:
        bound: ζ, in nats, > 0; below every group's reachable loss no w satisfies it.

    Source:
        Hu, Wu, Smith 2022, Fair federated learning via bounded group loss (arXiv 2203.10190); the row weights and the
        budget are those of Agarwal, Dudík, Wu 2019, Fair regression. Differs in that λ moves by projected ascent, and
        in the divisor of the weights.
    """

    bound: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A setting is not a positive number.
        """
        super().__post_init__()
        require(0 < self.bound < np.inf, "bounded_loss.bound: expected > 0", self.bound)

    def slack(self, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """See `Objective.slack`: ζ - r_g, in nats."""
        return {group: self.bound - value.mean_loss for group, value in present(sums).items()}


@dataclass(frozen=True)
class AccuracyGap(Penalties):
    """Highest minus lowest accuracy of the groups <= δ, by raising the loss of those that are behind.

    Penalties ascend on the true errors, (err_g - lowest err) - δ; w descends on losses, which have a gradient. The
    part of the constraint that would reward the best group for getting worse is left out of w's loss on purpose. What
    one model for all groups takes from the best to give to the others it may still take: report the worst accuracy
    beside the gap.

    Attributes:
        gap: δ, a difference of accuracies, in [0, 1).
        least_rows: Rows that a group needs in a round to take part, >= 1: the lowest error of many small groups is
            0 by luck.

    Source:
        Cotter, Jiang, Sridharan 2019, Two-player games for efficient non-convex constrained optimization (the proxy
        Lagrangian). Differs in the proxy, err_g ≈ r_g without the best group's part, and in projected ascent.
    """

    gap: float = 0.1
    least_rows: int = 10

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A setting is out of range.
        """
        super().__post_init__()
        require(0 <= self.gap < 1, "accuracy_gap.gap: expected in [0, 1)", self.gap)
        require(self.least_rows >= 1, "accuracy_gap.least_rows: expected >= 1", self.least_rows)

    def slack(self, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """See `Objective.slack`: δ - (err_g - lowest err), of the groups with ``least_rows`` rows."""
        errors = {group: value.error for group, value in present(sums, self.least_rows).items()}
        lowest = min(errors.values(), default=0.0)
        return {group: self.gap - (error - lowest) for group, error in errors.items()}
