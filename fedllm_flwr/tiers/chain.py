"""Queries through a chain of tiers: each goes on to the next tier only if it has to.

Axes: n rows, T tiers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers.tier import Tier, agreement, text_of


@dataclass(frozen=True)
class Answered:
    """What a query got.

    Attributes:
        text: The answer; None if the last tier had none either.
        tier: Name of the tier that answered.
        level: Its agreement.
        tokens: Read and written by all members of each tier that was called, in their order.
        cost: Of all of these, exact.
    """

    text: str | None
    tier: str
    level: float
    tokens: tuple[tuple[str, int, int], ...]
    cost: Fraction


@dataclass(frozen=True, eq=False)
class Chain:
    """Tiers and from which agreement on each but the last answers.

    Attributes:
        tiers: At least one.
        thetas: One less than tiers.

    Raises:
        ConfigError: The lengths do not fit.
    """

    tiers: tuple[Tier, ...]
    thetas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tiers or len(self.thetas) != len(self.tiers) - 1:
            raise ConfigError(
                f"chain: expected a threshold for every tier but the last, got {len(self.thetas)} for {len(self.tiers)}"
            )

    def answer(self, task: Task, rows: Sequence[Row]) -> list[Answered]:
        """Answer queries; each tier is asked once, for all queries that reach it.

        Args:
            task: The queries' task.
            rows: Queries with unique names; their targets are not read.

        Returns:
            In the order of the rows. Money is what every member of every called tier has read and written.

        Raises:
            FedLLMError: See :meth:`fedllm_flwr.tiers.tier.Tier.ask`.
        """
        found: dict[int, Answered] = {}
        tokens: list[tuple[tuple[str, int, int], ...]] = [()] * len(rows)
        costs = [Fraction(0)] * len(rows)
        waiting = list(range(len(rows)))
        for tier, theta in zip(self.tiers, (*self.thetas, None), strict=True):
            asked = waiting
            waiting = []
            for place, replies in zip(
                asked, tier.ask(task, [rows[i] for i in asked]) if asked else [], strict=True
            ):
                agreed = agreement(replies)
                read = sum(reply.input_tokens for reply in replies)
                written = sum(reply.output_tokens for reply in replies)
                tokens[place] = (*tokens[place], (tier.config.name, read, written))
                costs[place] += tier.price.cost(read, written)
                if theta is not None and not agreed.accepted(theta):
                    waiting.append(place)
                    continue
                found[place] = Answered(
                    text_of(replies, agreed),
                    tier.config.name,
                    agreed.level,
                    tokens[place],
                    costs[place],
                )
        return [found[place] for place in range(len(rows))]
