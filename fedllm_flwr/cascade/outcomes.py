"""What each tier would answer to each query, as arrays: what curves, signals and accounts are computed from.

Axes: Q queries, k members of a tier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.cascade.accounts import TOKENS, Price
from fedllm_flwr.cascade.agreement import (
    Agreement,
    Deferral,
    majority_is_right,
    score_vote,
    vote,
)
from fedllm_flwr.cascade.answers import Answer
from fedllm_flwr.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class TierOutcomes:
    """One tier on all queries.

    Attributes:
        tier: Its name.
        members: k.
        level: Agreement. float64 [Q]
        parsed: Whether there is an answer to return. bool [Q]
        correct: Whether that answer is right. bool [Q]
        input_tokens: Read by all members together. int64 [Q]
        output_tokens: Written by all members together. int64 [Q]
        price: Of a token.
        serial_seconds: Of all members one after the other, [Q]; None if not recorded.
        parallel_seconds: Of the slowest member, [Q]; None if not recorded.

    Raises:
        ShapeError: The arrays are not of one length, or there is no query.
    """

    tier: str
    members: int
    level: np.ndarray
    parsed: np.ndarray
    correct: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    price: Price = TOKENS
    serial_seconds: np.ndarray | None = None
    parallel_seconds: np.ndarray | None = None

    def __post_init__(self) -> None:
        arrays = (self.level, self.parsed, self.correct, self.input_tokens, self.output_tokens,
                  self.serial_seconds, self.parallel_seconds)  # fmt: skip
        shapes = {array.shape for array in arrays if array is not None}
        if len(shapes) != 1 or len(self.level.shape) != 1 or not self.level.size:
            raise ShapeError(
                f"tier {self.tier}: expected arrays of one length > 0, got {sorted(shapes)}"
            )

    @property
    def queries(self) -> int:
        """Q."""
        return int(self.level.size)

    @property
    def cost(self) -> np.ndarray:
        """Of each query, all members in full, float64 [Q]."""
        read = self.input_tokens * float(self.price.input)
        found: np.ndarray = read + self.output_tokens * float(self.price.output)
        return found

    def accepts(self, theta: float) -> np.ndarray:
        """Whether the tier answers each query at this threshold, bool [Q]."""
        found: np.ndarray = self.parsed & (self.level >= theta)
        return found


def tier_outcomes(
    answers: Sequence[Sequence[Answer]], price: Price, deferral: Deferral = "vote"
) -> TierOutcomes:
    """What a tier would answer to each query.

    Args:
        answers: For each query, of every member, in one order. [Q][k]
        price: Of the tier's tokens.
        deferral: How agreement is measured.

    Raises:
        ShapeError: There is no query, or a query has another number of members than the first.
        ConfigError: An answer lacks a score that the deferral needs, seconds are recorded for some answers only, or
            the same answer to a query is right and wrong.
    """
    if not answers or not answers[0]:
        raise ShapeError("tier: expected answers to at least one query, got none")
    tier, members = answers[0][0].tier, len(answers[0])
    odd = [row for row in answers if len(row) != members]
    if odd:
        raise ShapeError(
            f"tier {tier}: expected {members} answers to each query, got {len(odd[0])}"
        )
    agreed = [_agreement(row, deferral) for row in answers]
    correct = [_right(row, found) for row, found in zip(answers, agreed, strict=True)]
    seconds = _seconds(answers)
    return TierOutcomes(
        tier=tier,
        members=members,
        level=np.array([found.level for found in agreed]),
        parsed=np.array([found.label is not None for found in agreed]),
        correct=np.array(correct),
        input_tokens=np.array([sum(a.input_tokens for a in row) for row in answers], np.int64),
        output_tokens=np.array([sum(a.output_tokens for a in row) for row in answers], np.int64),
        price=price,
        serial_seconds=None if seconds is None else seconds.sum(axis=1),
        parallel_seconds=None if seconds is None else seconds.max(axis=1),
    )


def _agreement(row: Sequence[Answer], deferral: Deferral) -> Agreement:
    labels = [answer.label for answer in row]
    if deferral == "vote":
        return vote(labels)
    scores = [answer.score for answer in row if answer.score is not None]
    if len(scores) < len(row):
        raise ConfigError(f"query {row[0].query}, tier {row[0].tier}: expected scores, got none")
    return score_vote(labels, scores)


def _right(row: Sequence[Answer], agreed: Agreement) -> bool:
    try:
        return majority_is_right(agreed, [answer.correct for answer in row])
    except ConfigError as error:
        raise ConfigError(f"query {row[0].query}, tier {row[0].tier}: {error}") from None


def _seconds(answers: Sequence[Sequence[Answer]]) -> np.ndarray | None:
    """Seconds of each call, [Q, k]; None if none is recorded."""
    found = [answer.seconds for row in answers for answer in row if answer.seconds is not None]
    if not found:
        return None
    if len(found) < len(answers) * len(answers[0]):
        first = answers[0][0]
        raise ConfigError(
            f"tier {first.tier}: expected seconds of all calls or of none, got {len(found)} of "
            f"{len(answers) * len(answers[0])}"
        )
    return np.array(found, np.float64).reshape(len(answers), len(answers[0]))
