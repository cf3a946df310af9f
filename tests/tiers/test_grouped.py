from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tiers.grouped import GroupedMember
from fedllm_flwr.tiers.members import Asking

Fixture = Callable[..., Any]


def test_every_row_is_asked_with_what_its_group_has(task: Task, adapted: Fixture) -> None:
    members = {"even": adapted(1), "odd": adapted(2)}
    rows = [
        replace(row, group="odd" if place % 2 else "even")
        for place, row in enumerate(task.splits["test"])
    ]
    found = GroupedMember("both", members).ask(task, rows, Asking())
    alone = {group: own.ask(task, rows, Asking()) for group, own in members.items()}
    assert [own[0].text for own in found] == [
        alone[str(row.group)][place][0].text for place, row in enumerate(rows)
    ]
    assert alone["even"] != alone["odd"], "the two differ, so the test can fail"


def test_a_group_without_a_member_is_named(task: Task, adapted: Fixture) -> None:
    row = replace(task.splits["test"][0], group="third")
    with pytest.raises(ConfigError, match="expected rows of the groups first, got third"):
        GroupedMember("m", {"first": adapted(1)}).ask(task, [row], Asking())
