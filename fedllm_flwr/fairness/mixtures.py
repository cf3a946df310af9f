"""Objectives whose multipliers are shares of a mixture of groups: group DRO and agnostic federated learning.

Axes: g = groups with rows in a round; r_g = mean loss of a group, in nats.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.fairness.objectives import Multipliers, Objective, require, with_rows
from fedllm_flwr.fairness.simplex import project_simplex
from fedllm_flwr.fairness.sums import GroupSums, present

LEAST_SHARE = 1e-9
"""A group's least share under group DRO: from an underflow to 0, products never come back."""


class Mixture(Objective):
    """Multipliers are shares q_g on the simplex and the loss is Σ q_g r_g: a row weighs q_g · N / n_g.

    Uniform shares give the mean over groups, shares n_g / N the mean over rows. A new group joins with the
    mean share, whereupon the shares are scaled back to a sum of 1. Where groups of the state have no rows, the
    weights and the step are those of the groups that have: in proportion, and with the sum that they had.
    """

    def join(self, state: Multipliers, groups: Iterable[str]) -> dict[str, float]:
        """See `Objective.join`: a neutral multiplier is the mean share."""
        fresh = set(groups) - set(state)
        total = sum(state.values())
        neutral = total / len(state) if total else 1.0
        shares = {**state, **dict.fromkeys(fresh, neutral)}
        scale = sum(shares.values())
        return {group: shares[group] / scale for group in sorted(shares)}

    def row_weights(self, state: Multipliers, counts: Mapping[str, int]) -> dict[str, float]:
        """See `Objective.row_weights`; rows of groups whose shares are all 0 weigh 1."""
        rows = with_rows(counts)
        shares = self.join(state, rows)
        mass = sum(shares[group] for group in rows)
        if not mass:
            return dict.fromkeys(rows, 1.0)
        total = sum(rows.values())
        return {group: shares[group] / mass * total / count for group, count in rows.items()}

    def update(self, state: Multipliers, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """See `Objective.update`: the shares of groups with rows step within their own sum."""
        shares = self.join(state, sums)
        seen = sorted(present(sums))
        if seen:
            before = np.array([shares[group] for group in seen])
            losses = np.array([sums[group].mean_loss for group in seen])
            shares |= zip(seen, self._step(before, losses).tolist(), strict=True)
        return shares

    @abstractmethod
    def _step(self, shares: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Shares [g] to shares of the same sum, given r_g [g]."""


@dataclass(frozen=True)
class GroupDro(Mixture):
    """Group DRO: min over w of the largest group's mean loss, by exponentiated ascent on the shares.

    Attributes:
        step: η of q_g ← q_g · exp(η r_g) / Z, per nat, > 0.

    Source:
        Sagawa et al. 2020, Distributionally robust neural networks, Algorithm 1. Differs in that all groups of a
        round move at once, that groups without rows keep their share, and in a least share.
    """

    step: float = 0.1

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: The step is not a positive number.
        """
        require(0 < self.step < np.inf, "group_dro.step: expected > 0", self.step)

    def _step(self, shares: np.ndarray, losses: np.ndarray) -> np.ndarray:
        mass = shares.sum()
        raised = shares * np.exp(self.step * (losses - losses.max()))
        raised = np.maximum(raised / raised.sum(), LEAST_SHARE)
        result: np.ndarray = mass * raised / raised.sum()
        return result


@dataclass(frozen=True)
class Agnostic(Mixture):
    """Agnostic federated learning: the worst mixture of the groups, by projected ascent on the shares.

    Attributes:
        step: γ of λ ← project(λ + γ r), per nat, > 0.

    Source:
        Mohri et al. 2019, Agnostic federated learning (Stochastic-AFL), with Λ the whole simplex.
        Differs in that groups without rows keep their share.
    """

    step: float = 0.1

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: The step is not a positive number.
        """
        require(0 < self.step < np.inf, "agnostic.step: expected > 0", self.step)

    def _step(self, shares: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return project_simplex(shares + self.step * losses, float(shares.sum()))
