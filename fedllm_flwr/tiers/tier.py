"""A tier with its members, and what they answer together.

Axes: n rows, k members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fedllm_flwr.cascade import Agreement, Price, normalised, vote
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.cascade import TierConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers.endpoint import Endpoint
from fedllm_flwr.tiers.grouped import GroupedMember
from fedllm_flwr.tiers.members import Asking, LocalMember, Reply

Member = LocalMember | GroupedMember | Endpoint


@dataclass(frozen=True, eq=False)
class Tier:
    """Settings and members that can be asked.

    Attributes:
        config: Of the tier.
        members: One for each of the configured members.
        seed: Of samples.
    """

    config: TierConfig
    members: tuple[Member, ...]
    seed: int = 0

    @property
    def price(self) -> Price:
        """Of a token, exact."""
        read, written = (str(price) for price in (self.config.price_in, self.config.price_out))
        return Price(Fraction(read), Fraction(written))

    @property
    def asking(self) -> Asking:
        """How each member is asked."""
        return Asking(
            samples=self.config.samples,
            temperature=self.config.temperature,
            max_new_tokens=self.config.max_new_tokens,
            seed=derive_seed(self.seed, "cascade", self.config.name),
        )

    def ask(self, task: Task, rows: Sequence[Row]) -> list[tuple[Reply, ...]]:
        """The answers of all members to each query.

        Args:
            task: The queries' task.
            rows: Queries with unique names.

        Returns:
            For each row, k answers in the order of ``config.names``. [n][k]

        Raises:
            FedLLMError: See :meth:`fedllm_flwr.tiers.members.LocalMember.ask` and
                :meth:`fedllm_flwr.tiers.endpoint.Endpoint.ask`.
        """
        by_member = [member.ask(task, rows, self.asking) for member in self.members]
        return [
            tuple(reply for own in replies for reply in own)
            for replies in zip(*by_member, strict=True)
        ]


def agreement(replies: Sequence[Reply]) -> Agreement:
    """Votes of a tier's members; the label is what is compared, see :func:`text_of` for what is said."""
    return vote([normalised(reply.text) for reply in replies])


def text_of(replies: Sequence[Reply], agreed: Agreement) -> str | None:
    """The majority's answer as its first member has spelled it; None if there is none."""
    return replies[agreed.members[0]].text if agreed.label is not None else None


def is_right(task: Task, row: Row, text: str | None) -> bool:
    """Whether an answer is the word of the row's label, or its target text, compared as answers are compared.

    Args:
        task: Whose words labels are answered with.
        row: With its label or target.
        text: The answer; None is never right.
    """
    wanted = row.target if row.label is None else task.label_words[row.label]
    return text is not None and normalised(text) == normalised(wanted)


def record(task: Task, row: Row, tier: str, member: str, reply: Reply) -> Mapping[str, Any]:
    """An answer as a line of a recording has it (see :mod:`fedllm_flwr.cascade.recording`)."""
    scored = {} if reply.score is None else {"score": reply.score}
    return {
        "query": row.row_id,
        "tier": tier,
        "member": member,
        "answer": reply.text,
        "correct": is_right(task, row, reply.text),
        "input_tokens": reply.input_tokens,
        "output_tokens": reply.output_tokens,
        **scored,
    }
