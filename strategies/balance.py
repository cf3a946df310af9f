"""Fairness over groups at the server: the groups' multipliers, what is broadcast of them, and how they move.

Down go the weights of the groups' rows; up come each client's sums per group, at the model that the round began with.
"""

from collections.abc import Mapping
from typing import Any

from fedllm_flwr.errors import WireError
from fedllm_flwr.fairness import (
    AccuracyGap,
    Agnostic,
    BoundedLoss,
    GroupDro,
    GroupSums,
    Objective,
    PlainMean,
    pool,
)
from fedllm_flwr.settings.federation import FairnessConfig
from strategies.exchange import ClientReply, checked_number

LEAST_FACTOR = 1e-9
"""Of a client all of whose groups have a share of 0: it counts for nothing, and is no error."""
MAX_GROUPS = 1000
"""Of one client's answer: more is no answer of an honest client."""


def objective_of(config: FairnessConfig) -> Objective:
    """The objective over rows; the plain mean where rows are not weighed (q-FFL weighs clients).

    Raises:
        ConfigError: A setting is outside the objective's range.
    """
    step, budget = config.step_size, config.max_multiplier
    if config.name == "group_dro":
        return GroupDro(step=step)
    if config.name == "agnostic":
        return Agnostic(step=step)
    if config.name == "bounded_loss":
        return BoundedLoss(step=step, budget=budget, bound=config.bound)
    if config.name == "accuracy_gap":
        return AccuracyGap(step=step, budget=budget, gap=config.max_gap)
    return PlainMean()


class Balance:
    """The multipliers of a run's groups. One round is begin, add for each client, finish.

    Args:
        config: The objective and its settings.
    """

    def __init__(self, config: FairnessConfig) -> None:
        self._config = config
        self._objective = objective_of(config)
        self._multipliers: dict[str, float] = {}
        self._counts: dict[int, dict[str, int]] = {}
        self._round: list[Mapping[str, GroupSums]] = []
        self._sent: dict[str, Any] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Training rows of each group over every client that has answered so far."""
        found: dict[str, int] = {}
        for own in self._counts.values():
            for group, count in own.items():
                found[group] = found.get(group, 0) + count
        return dict(sorted(found.items()))

    def instruction(self) -> dict[str, Any]:
        """What this round's training messages say about groups, a retry's too: nothing without an objective."""
        return self._sent

    def begin(self) -> None:
        """Start a round; its weights are those of the multipliers and counts so far, none before any are known."""
        self._round = []
        if self._config.name == "q_ffl":
            self._sent = {"group-weights": {}}
        elif self._config.name != "none":
            weights = self._objective.row_weights(self._multipliers, self.counts)
            self._sent = {"group-weights": weights}

    def factor(self, sums: Mapping[str, GroupSums]) -> float:
        """What a client's weight in the mean is multiplied with: the mean weight of its rows, above 0.

        Clients scale their rows' weights to a mean of 1 (see ``clients.groups.row_weights``), so what their rows weigh
        together counts here.
        """
        weights = self._sent.get("group-weights") or {}
        total = sum(value.total for value in sums.values())
        if not weights or not total:
            return 1.0
        mean = sum(weights.get(name, 1.0) * value.total for name, value in sums.items()) / total
        return max(mean, LEAST_FACTOR)

    def checked(self, reply: ClientReply) -> dict[str, GroupSums]:
        """A client's sums per group.

        Raises:
            WireError: They are absent although they were asked for, or are no sums.
        """
        if self._config.name == "none":
            return {}
        client = f"client {reply.partition_id}"
        groups: Any = reply.info.get("groups")
        if not isinstance(groups, dict) or not 0 < len(groups) <= MAX_GROUPS:
            raise WireError(f"{client}: expected sums by group, got {groups!r:.60}")
        found = {}
        for name, sums in groups.items():
            who = f"{client}, group {name}"
            if not isinstance(sums, dict):
                raise WireError(f"{who}: expected sums, got {sums!r:.60}")
            found[str(name)] = GroupSums(
                float(checked_number(who, sums, "loss_sum", whole=False)),
                checked_number(who, sums, "correct", whole=True),
                checked_number(who, sums, "total", whole=True),
            )
        return found

    def add(self, partition_id: int, sums: Mapping[str, GroupSums]) -> None:
        """Count a client whose update has been added."""
        if sums:
            self._round.append(sums)
            self._counts[partition_id] = {group: value.total for group, value in sums.items()}

    def finish(self, server_round: int) -> list[dict[str, Any]]:
        """Move the multipliers.

        Returns:
            One record per group: its sums over the cohort, its next multiplier and its slack.
        """
        if self._config.name == "none":
            return []
        sums = pool(self._round)
        self._multipliers = self._objective.update(self._multipliers, sums)
        slack = self._objective.slack(sums)
        return [
            {
                "kind": "multiplier",
                "round": server_round,
                "group": group,
                "multiplier": multiplier,
                **({"loss": sums[group].mean_loss, "total": sums[group].total} if group in sums else {}),
                **({"slack": slack[group]} if group in slack else {}),
            }
            for group, multiplier in self._multipliers.items()
        ]  # fmt: skip

    def slack(self, sums: Mapping[str, GroupSums]) -> dict[str, float]:
        """How far each group stays inside the objective's constraint, if it has one; below 0 it is broken."""
        return self._objective.slack(sums)

    def state(self) -> dict[str, Any]:
        """What the next round depends on, as JSON."""
        return {
            "multipliers": self._multipliers,
            "counts": {str(client): counts for client, counts in self._counts.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`."""
        self._multipliers = dict(state["multipliers"])
        self._counts = {int(client): dict(counts) for client, counts in state["counts"].items()}
