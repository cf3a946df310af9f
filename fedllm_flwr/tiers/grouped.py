"""A member that adds something else for each group of rows, such as a soft prompt for each language.

Axes: n rows, k samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers.members import Asking, LocalMember, Reply


@dataclass(frozen=True, eq=False)
class GroupedMember:
    """Members by group, under one name.

    Attributes:
        name: In recorded answers.
        members: By the group of the rows that they answer.
    """

    name: str
    members: Mapping[str, LocalMember]

    def ask(self, task: Task, rows: Sequence[Row], asking: Asking) -> list[tuple[Reply, ...]]:
        """Answer queries, each by the member of its group.

        Args:
            task: The queries' task.
            rows: Queries with unique names and a group each.
            asking: How.

        Returns:
            As :meth:`fedllm_flwr.tiers.members.LocalMember.ask`. [n][k]

        Raises:
            ConfigError: A row's group has no member; or as there.
        """
        lacking = sorted({str(row.group) for row in rows} - set(self.members))
        if lacking:
            raise ConfigError(
                f"member {self.name}: expected rows of the groups {', '.join(sorted(self.members))}, got {lacking[0]}"
            )
        found: list[tuple[Reply, ...]] = [()] * len(rows)
        for group, member in self.members.items():
            places = [place for place, row in enumerate(rows) if row.group == group]
            replies = member.ask(task, [rows[place] for place in places], asking)
            for place, own in zip(places, replies, strict=True):
                found[place] = own
        return found
