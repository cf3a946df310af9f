"""What clients minimise when groups matter, and how the server moves the groups' multipliers.

Axes: g = groups, n_g = rows of a group, N = Σ n_g over the groups that have rows, r_g = mean loss of a group in nats.

All objectives keep one number per group, its multiplier, and act on the clients by a weight for each row of a group:

    F(w) = 1/N Σ_i weight[g(i)] · loss_i(w)

**The mean row weight is 1 under every objective** (Σ n_g weight_g = N), so a learning rate means the same under all of
them, and weights that are all equal give the plain mean over rows. State is a plain mapping from group to multiplier:
state in, state out, a checkpoint is its JSON. A group that is not in the state joins with a neutral multiplier; a group
without rows in a round keeps the multiplier that it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.fairness.sums import GroupSums

Multipliers = Mapping[str, float]


class Objective(ABC):
    """How groups weigh; subclasses are frozen dataclasses of their settings."""

    def start(self, groups: Iterable[str]) -> dict[str, float]:
        """Neutral multipliers, before the first round.

        Args:
            groups: Names of the groups that are known; more may join later.

        Returns:
            Multiplier by group, sorted by name.
        """
        return self.join({}, groups)

    @abstractmethod
    def join(self, state: Multipliers, groups: Iterable[str]) -> dict[str, float]:
        """The state with neutral multipliers for groups that are new to it.

        Args:
            state: Multiplier by group; not changed.
            groups: Names of groups; those that the state knows change nothing.

        Returns:
            Multiplier by group, sorted by name.
        """

    @abstractmethod
    def row_weights(self, state: Multipliers, counts: Mapping[str, int]) -> dict[str, float]:
        """The weight of one row of each group in the clients' loss.

        Args:
            state: Multiplier by group; groups without one count as neutral.
            counts: Training rows of each group over all clients that the mean runs over.

        Returns:
            Weight by group, for the groups that have rows: >= 0, with Σ n_g weight_g = N.
        """

    @abstractmethod
    def update(self, state: Multipliers, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """The multipliers after a round.

        Args:
            state: The multipliers that the round was trained with; not changed.
            sums: Sums over the cohort's rows by group, at the model that the round began or ended with;
                groups without rows may be left out.

        Returns:
            The next multipliers, sorted by name, with every group of the state and of the sums.
        """

    def slack(self, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """How far each group stays inside its constraint; below 0 it is broken.

        Args:
            sums: Sums by group, as a rule over held-out rows.

        Returns:
            Slack by group that has rows; empty for an objective without a constraint.
        """
        return {}


@dataclass(frozen=True)
class PlainMean(Objective):
    """The mean over all rows: groups do not matter, every multiplier is 1."""

    def join(self, state: Multipliers, groups: Iterable[str]) -> dict[str, float]:
        """See `Objective.join`: a neutral multiplier is 1."""
        return dict.fromkeys(sorted({*state, *groups}), 1.0)

    def row_weights(self, state: Multipliers, counts: Mapping[str, int]) -> dict[str, float]:
        """See `Objective.row_weights`: 1 for all."""
        return dict.fromkeys(with_rows(counts), 1.0)

    def update(self, state: Multipliers, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """See `Objective.update`: nothing moves."""
        return self.join(state, sums)


def with_rows(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts of the groups that have rows."""
    return {group: count for group, count in counts.items() if count > 0}


def require(holds: bool, expected: str, got: float) -> None:
    """Refuse a setting that is out of range.

    Raises:
        ConfigError: It does not hold; says what was expected and what came.
    """
    if not holds:
        raise ConfigError(f"{expected}, got {got}")
