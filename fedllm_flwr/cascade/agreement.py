"""How far the members of a tier agree, and whether that is enough to stop.

Axes: k members of a tier, all of them, also those whose answer could not be parsed.

Source:
    Kolawole, Dennis, Talwalkar and Smith 2025, Agreement-based cascading (arXiv 2407.02348), vote-based and score-based
    deferral. The paper defers at an agreement of θ or less; here a tier answers from θ on (>=). With k = 5 and
    θ = 0.8 four of five members are enough here, where ">" would ask for all five.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.errors import ConfigError, ShapeError

Deferral = Literal["vote", "score"]


@dataclass(frozen=True)
class Agreement:
    """What a tier would answer, and how sure it is of that.

    Attributes:
        label: The majority's answer; None if no member's answer could be parsed.
        members: Places of the members that gave it, in order; of all members if there is no label.
        level: In [0, 1]; 0 if there is no label.
    """

    label: str | None
    members: tuple[int, ...]
    level: float

    def accepted(self, theta: float) -> bool:
        """Whether the tier answers: there is a label, and the level is at least θ."""
        return self.label is not None and self.level >= theta


def vote(labels: Sequence[str | None]) -> Agreement:
    """Agreement by votes: the share of all members that gave the most frequent label.

    Args:
        labels: Of each member; None where nothing could be parsed. Such an answer counts in k and agrees with no
            other one, not even with another of its kind. [k]

    Returns:
        Level: count of the label / k. Among labels of the same count the one whose first member stands first wins.

    Raises:
        ShapeError: There is no member.
    """
    if not labels:
        raise ShapeError("agreement: expected at least one member, got none")
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        if label is not None:
            places.setdefault(label, []).append(place)
    if not places:
        return Agreement(None, tuple(range(len(labels))), 0.0)
    # max takes the first of equals, and a dict keeps the order in which labels came.
    label = max(places, key=lambda name: len(places[name]))
    return Agreement(label, tuple(places[label]), len(places[label]) / len(labels))


def score_vote(labels: Sequence[str | None], scores: Sequence[float]) -> Agreement:
    """Agreement by scores: the mean score that the members give to the most frequent label.

    Args:
        labels: As in :func:`vote`. [k]
        scores: Each member's score of its own answer, in [0, 1]. [k]

    Returns:
        The label of :func:`vote`; level: Σ of the scores of the members that gave it, / k.

    Raises:
        ShapeError: The lengths differ, or there is no member.
        ConfigError: A score is out of range.

    Source:
        As above. There every member scores every label; a recorded answer has the member's score of its own answer
        only, so a member that answered otherwise counts with the least that it can have given, 0.
    """
    if len(labels) != len(scores):
        raise ShapeError(
            f"agreement: expected a score for each of {len(labels)} members, got {len(scores)}"
        )
    odd = [score for score in scores if not 0 <= score <= 1]
    if odd:
        raise ConfigError(f"agreement: expected scores in [0, 1], got {odd[0]}")
    voted = vote(labels)
    if voted.label is None:
        return voted
    level = sum(scores[place] for place in voted.members) / len(labels)
    return Agreement(voted.label, voted.members, level)


def majority_is_right(agreement: Agreement, correct: Sequence[bool]) -> bool:
    """Whether the majority's answer is right: what is recorded of the members that gave it.

    Args:
        agreement: Of the tier's members.
        correct: Whether each member's answer is right. [k]

    Returns:
        Where no answer could be parsed, what is recorded of the first member.

    Raises:
        ConfigError: The same answer is right for one member and wrong for another.
    """
    found = {bool(correct[place]) for place in agreement.members}
    if agreement.label is None:
        return bool(correct[0])
    if len(found) > 1:
        raise ConfigError(
            f"answer {agreement.label!r}: expected the same correctness from every member that gave it, got both"
        )
    return found.pop()


def levels_of(members: int) -> tuple[float, ...]:
    """Every level that votes of k members can have, from 0 to 1.

    Args:
        members: k, >= 1.

    Raises:
        ConfigError: There is no member.
    """
    if members < 1:
        raise ConfigError(f"levels: expected members >= 1, got {members}")
    return tuple(count / members for count in range(members + 1))
