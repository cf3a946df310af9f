from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers.members import Asking, Reply
from fedllm_flwr.tiers.tier import agreement, is_right, record, text_of

Fixture = Callable[..., Any]


def test_a_tier_asks_each_member_in_order(task: Task, tier: Fixture, adapted: Fixture) -> None:
    rows = task.splits["test"]
    replies = tier("t", 1, 2).ask(task, rows)
    for place, seed in enumerate((1, 2)):
        assert [own[place] for own in replies] == [
            own[0] for own in adapted(seed).ask(task, rows, Asking())
        ]
    assert tier("t", 1).ask(task, []) == []


def test_seeds_of_samples_belong_to_the_tier(task: Task, tier: Fixture) -> None:
    options = {"kind": "self_consistency", "samples": 3, "temperature": 2.0}
    one, other = tier("a", 1, **options), tier("b", 1, **options)
    rows = task.splits["test"]
    assert one.ask(task, rows) == one.ask(task, rows)
    assert one.ask(task, rows) != other.ask(task, rows)
    assert one.ask(task, rows) != replace(one, seed=1).ask(task, rows)


def test_prices_are_exact(tier: Fixture) -> None:
    assert tier("t", 1, price_in=0.1, price_out=0.7).price.cost(3, 1) == Fraction(1)


def test_the_majority_is_said_as_its_first_member_spelled_it() -> None:
    replies = [Reply("No", 1, 1), Reply(" Yes", 1, 1), Reply("yes", 1, 1), Reply(None, 1, 0)]
    agreed = agreement(replies)
    assert (agreed.label, agreed.level) == ("yes", 0.5)
    assert text_of(replies, agreed) == " Yes"
    nothing = [Reply(None, 1, 0), Reply("  ", 1, 0)]
    assert text_of(nothing, agreement(nothing)) is None


@pytest.mark.parametrize(
    ("row", "text", "right"),
    [
        (Row("a", "", "animal", 0), "animal", True),
        (Row("a", "", "animal", 0), "food", False),
        (Row("a", "", "animal", 0), None, False),
        (Row("a", "", "Some  Title"), "some title", True),
        (Row("a", "", "Some Title"), "some", False),
    ],
)
def test_right_is_the_word_of_the_label_or_the_target(
    row: Row, text: str | None, right: bool, task: Task
) -> None:
    assert is_right(task, row, text) is right


def test_a_record_has_the_fields_of_a_replay(task: Task) -> None:
    row = Row("q", "", "food", 1)
    found = record(task, row, "t", "m", Reply("food", 9, 1, 0.5))
    assert found == {
        "query": "q", "tier": "t", "member": "m", "answer": "food", "correct": True, "input_tokens": 9,
        "output_tokens": 1, "score": 0.5,
    }  # fmt: skip
    assert "score" not in record(task, row, "t", "m", Reply("food", 9, 1))
