"""Recorded answers: what a file of them must hold, checked record by record.

A record has the fields of :data:`FIELDS`, perhaps some of :data:`OPTIONAL`, and no other. Every query has one answer of
every member of every tier: lines such as "always the last tier" need all of them.

Axes: Q queries, k members of a tier.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm_flwr.cascade.agreement import vote
from fedllm_flwr.cascade.answers import Answer, normalised
from fedllm_flwr.errors import DataError

FIELDS = ("query", "tier", "member", "answer", "correct", "input_tokens", "output_tokens")
OPTIONAL = ("score", "seconds")
MOST_TOKENS = 2**32
"""Of one answer: sums over a file stay exact in 64 bits."""

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Recording:
    """Answers of every member of every tier to every query.

    Attributes:
        queries: Names, in the order in which they first appear. [Q]
        tiers: Answers by tier, from the first tier to the last; for each query, of each member. [Q][k]
    """

    queries: tuple[str, ...]
    tiers: dict[str, tuple[tuple[Answer, ...], ...]]

    def has_scores(self, tier: str) -> bool:
        """Whether the tier's answers have scores: all have them, or none."""
        return self.tiers[tier][0][0].score is not None


def recording(records: Iterable[tuple[int, Fields]], file_name: str) -> Recording:
    """Check records and put them in order.

    Tiers that are all integers are in ascending order, other tiers in the order in which they first appear. Members of
    a tier are in the order in which they first appear.

    Args:
        records: Line and fields of each; see :data:`FIELDS`.
        file_name: For messages.

    Raises:
        DataError: A field is unknown, missing or malformed; an answer is given twice or missing; only some answers of
            a tier have a score, or only some of the file have seconds; or the answer that most members of a tier gave
            is right in one record and wrong in another. Names file and line.
    """
    lines: dict[tuple[str, str, str], int] = {}
    found: dict[tuple[str, str, str], Answer] = {}
    for line, fields in records:
        answer = _answer(fields, f"{file_name}, line {line}")
        key = (answer.query, answer.tier, answer.member)
        if key in found:
            raise DataError(
                f"{file_name}, line {line}: expected one answer of member {answer.member!r} of tier {answer.tier!r} "
                f"to query {answer.query!r}, got another one after line {lines[key]}"
            )
        lines[key], found[key] = line, answer
    if not found:
        raise DataError(f"{file_name}, line 1: expected records, got none")
    queries = tuple(dict.fromkeys(query for query, _, _ in found))
    members: dict[str, dict[str, None]] = {}
    for _, tier, member in found:
        members.setdefault(tier, {})[member] = None
    table = {
        tier: tuple(
            tuple(_given(found, (query, tier, member), file_name) for member in members[tier])
            for query in queries
        )
        for tier in _ordered(members)
    }
    for tier, rows in table.items():
        _check_all_or_none(rows, "score", f"tier {tier!r}", lines, file_name)
        for row in rows:
            _check_majority(row, lines, file_name)
    _check_all_or_none(
        [row for rows in table.values() for row in rows], "seconds", "the file", lines, file_name
    )
    return Recording(queries, table)


def _answer(fields: Fields, place: str) -> Answer:
    for name in fields:
        if name not in READERS:
            raise DataError(
                f"{place}, field {name!r}: expected one of {', '.join(READERS)}, got an unknown field"
            )
    values: dict[str, Any] = {}
    for name, read in READERS.items():
        if name not in fields:
            if name in FIELDS:
                raise DataError(f"{place}, field {name!r}: expected a value, got none")
            continue
        try:
            values[name] = read(fields[name])
        except _MalformedError as error:
            raise DataError(
                f"{place}, field {name!r}: expected {error}, got {fields[name]!r}"
            ) from None
    return Answer(label=values.pop("answer"), **values)


class _MalformedError(Exception):
    """What was expected."""


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise _MalformedError("a name (text or an integer)")
    if any("\ud800" <= character <= "\udfff" for character in str(value)):
        raise _MalformedError("a name without half of a surrogate pair")
    return str(value).strip()


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, str | int):
        return normalised(None if value is None else str(value))
    if isinstance(value, float) and math.isfinite(value):
        # 18 and 18.0 are one number in JSON
        return str(int(value)) if value.is_integer() else str(value)
    raise _MalformedError("an answer (text, a number, true, false or null)")


def _truth(value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise _MalformedError("true or false")


def _count(value: Any) -> int:
    if (
        isinstance(value, float) and value.is_integer()
    ):  # as tables write a column that has gaps elsewhere
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _MalformedError("an integer >= 0")
    if value > MOST_TOKENS:
        raise _MalformedError(f"at most {MOST_TOKENS} tokens")
    return value


def _number(value: Any, highest: float, expected: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _MalformedError(expected)
    if not 0 <= value <= highest or math.isinf(value):
        raise _MalformedError(expected)
    return float(value)


def _score(value: Any) -> float | None:
    return _number(value, 1.0, "a number in [0, 1] or null")


def _seconds(value: Any) -> float | None:
    return _number(value, math.inf, "a finite number >= 0 or null")


READERS: dict[str, Callable[[Any], Any]] = {
    "query": _name,
    "tier": _name,
    "member": _name,
    "answer": _text,
    "correct": _truth,
    "input_tokens": _count,
    "output_tokens": _count,
    "score": _score,
    "seconds": _seconds,
}
"""The closed table of fields: those of :data:`FIELDS`, then those of :data:`OPTIONAL`."""


def _ordered(tiers: Iterable[str]) -> list[str]:
    names = list(tiers)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return names


def _given(
    found: Mapping[tuple[str, str, str], Answer], key: tuple[str, str, str], file_name: str
) -> Answer:
    if key not in found:
        query, tier, member = key
        raise DataError(
            f"{file_name}: query {query!r} may be deferred to tier {tier!r}, expected an answer of its member "
            f"{member!r}, got none"
        )
    return found[key]


def _check_all_or_none(
    rows: Iterable[tuple[Answer, ...]],
    field: str,
    where: str,
    lines: Mapping[tuple[str, str, str], int],
    file_name: str,
) -> None:
    answers = [answer for row in rows for answer in row]
    lacking = [answer for answer in answers if getattr(answer, field) is None]
    if lacking and len(lacking) < len(answers):
        line = lines[lacking[0].query, lacking[0].tier, lacking[0].member]
        raise DataError(
            f"{file_name}, line {line}, field {field!r}: expected a value, as in other records of {where}, got none"
        )


def _check_majority(
    row: tuple[Answer, ...], lines: Mapping[tuple[str, str, str], int], file_name: str
) -> None:
    agreed = vote([answer.label for answer in row])
    first, *others = (row[place] for place in agreed.members)
    for other in others if agreed.label is not None else ():
        if other.correct != first.correct:
            line = lines[other.query, other.tier, other.member]
            raise DataError(
                f"{file_name}, line {line}, field 'correct': expected {first.correct} as for the same answer "
                f"{agreed.label!r} of member {first.member!r}, got {other.correct}"
            )
