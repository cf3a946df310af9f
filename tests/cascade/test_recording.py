from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.cascade import Recording, recording
from fedllm_flwr.cascade.recording import FIELDS, OPTIONAL, READERS
from fedllm_flwr.errors import DataError

Record = Callable[..., dict[str, Any]]


def read(*records: dict[str, Any]) -> Recording:
    return recording(list(enumerate(records, start=1)), "answers.jsonl")


def test_answers_are_put_in_order(record: Record) -> None:
    found = read(
        record("q2", "small", "b", "Yes", True, score=0.5, seconds=1),
        record("q2", "large", "x", "no", False, seconds=2.5),
        record("q1", "small", "a", 7, False, score=1, seconds=0),
        record("q2", "small", "a", " ", False, score=0, seconds=1),
        record("q1", "large", "x", None, False, seconds=3),
        record("q1", "small", "b", True, 1, score=0.25, seconds=1),
    )
    assert found.queries == ("q2", "q1")
    assert list(found.tiers) == ["small", "large"]
    small = found.tiers["small"]
    assert [[answer.member for answer in row] for row in small] == [["b", "a"], ["b", "a"]]
    assert [[answer.label for answer in row] for row in small] == [["yes", None], ["true", "7"]]
    assert [[answer.correct for answer in row] for row in small] == [[True, False], [True, False]]
    assert found.has_scores("small")
    assert not found.has_scores("large")
    assert found.tiers["large"][0][0].seconds == 2.5


@pytest.mark.parametrize(
    ("given", "order"),
    [([10, 2, -1], ["-1", "2", "10"]), (["b", "a"], ["b", "a"]), (["10", "9"], ["9", "10"]), (["2", "a"], ["2", "a"])],
)  # fmt: skip
def test_integers_are_sorted_and_names_stay_as_they_come(
    given: list[str | int], order: list[str], record: Record
) -> None:
    found = read(*(record("q", tier, "m", "a", True) for tier in given))
    assert list(found.tiers) == order


def test_every_field_is_read_by_its_own_rule() -> None:
    assert tuple(READERS) == (*FIELDS, *OPTIONAL)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("query", "", "expected a name (text or an integer), got ''"),
        ("query", None, "expected a name (text or an integer), got None"),
        ("tier", 1.5, "expected a name (text or an integer), got 1.5"),
        ("member", True, "expected a name (text or an integer), got True"),
        ("tier", "\ud800", "expected a name without half of a surrogate pair, got '\\ud800'"),
        (
            "answer",
            float("nan"),
            "expected an answer (text, a number, true, false or null), got nan",
        ),
        (
            "answer",
            float("inf"),
            "expected an answer (text, a number, true, false or null), got inf",
        ),
        ("input_tokens", 2**32 + 1, "expected at most 4294967296 tokens, got 4294967297"),
        ("answer", ["a"], "expected an answer (text, a number, true, false or null), got ['a']"),
        ("correct", "true", "expected true or false, got 'true'"),
        ("correct", 0.5, "expected true or false, got 0.5"),
        ("correct", None, "expected true or false, got None"),
        ("input_tokens", -1, "expected an integer >= 0, got -1"),
        ("input_tokens", 1.5, "expected an integer >= 0, got 1.5"),
        ("output_tokens", True, "expected an integer >= 0, got True"),
        ("output_tokens", "3", "expected an integer >= 0, got '3'"),
        ("score", 1.2, "expected a number in [0, 1] or null, got 1.2"),
        ("score", float("nan"), "expected a number in [0, 1] or null, got nan"),
        ("seconds", -1, "expected a finite number >= 0 or null, got -1"),
        ("seconds", float("inf"), "expected a finite number >= 0 or null, got inf"),
        ("seconds", "1", "expected a finite number >= 0 or null, got '1'"),
    ],
)
def test_a_malformed_value_is_named(field: str, value: Any, message: str, record: Record) -> None:
    good = record("q", "t", "m", "a", True)
    with pytest.raises(DataError) as caught:
        read(good, {**record("q", "t", "n", "a", True), field: value})
    assert str(caught.value) == f"answers.jsonl, line 2, field {field!r}: {message}"


def test_a_number_is_the_same_however_it_is_written(record: Record) -> None:
    found = read(
        *(record("q", "t", str(n), said, True) for n, said in enumerate((18, 18.0, "18", 2.5)))
    )
    assert [answer.label for answer in found.tiers["t"][0]] == ["18", "18", "18", "2.5"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field: str, record: Record) -> None:
    odd = record("q", "t", "m", "a", True)
    del odd[field]
    with pytest.raises(DataError, match=f"line 1, field '{field}': expected a value, got none"):
        read(odd)


def test_a_field_that_would_not_be_read_is_refused(record: Record) -> None:
    with pytest.raises(
        DataError, match=r"line 1, field 'cost': expected one of query, .*, seconds, got an unknown"
    ):
        read(record("q", "t", "m", "a", True, cost=1))


def test_a_query_that_could_not_be_deferred_is_named(record: Record) -> None:
    rows = [record("q1", "small", "a", "x", True), record("q1", "large", "b", "x", True),
            record("q2", "small", "a", "x", True)]  # fmt: skip
    with pytest.raises(
        DataError,
        match="query 'q2' may be deferred to tier 'large', expected an answer of its member 'b', got none",
    ):
        read(*rows)


def test_an_answer_that_is_given_twice_is_named(record: Record) -> None:
    with pytest.raises(
        DataError,
        match=r"line 2: .* member 'm' of tier 't' to query 'q', got another one after line 1",
    ):
        read(record("q", "t", "m", "a", True), record("q", "t", "m", "b", True))


@pytest.mark.parametrize("field", OPTIONAL)
def test_a_figure_of_some_answers_only_is_refused(field: str, record: Record) -> None:
    rows = [record("q1", "t", "m", "a", True, **{field: 0.5}), record("q2", "t", "m", "a", True)]
    with pytest.raises(
        DataError, match=f"line 2, field '{field}': expected a value, as in other records of"
    ):
        read(*rows)
    assert read(*({**row, field: None} for row in rows)).tiers["t"][0][0].score is None


def test_a_majority_that_is_right_and_wrong_is_refused(record: Record) -> None:
    rows = [
        record("q", "t", "a", "x", True),
        record("q", "t", "b", "y", False),
        record("q", "t", "c", "X", False),
    ]
    with pytest.raises(
        DataError,
        match="line 3, field 'correct': expected True as for the same answer 'x' of member 'a', got False",
    ):
        read(*rows)


def test_no_records_are_no_recording() -> None:
    with pytest.raises(DataError, match="line 1: expected records, got none"):
        read()
