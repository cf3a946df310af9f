"""What a member of a tier answered, as it was recorded, and how an answer is compared.

Axes: k members of a tier.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """One member's answer to one query.

    Attributes:
        query: Name of the query.
        tier: Name of the tier.
        member: Name of the member, unique in its tier.
        label: What is compared, see :func:`normalised` and :func:`parsed_label`; None if nothing could be parsed.
        correct: Whether the answer is right.
        input_tokens: Read by the member for this answer, >= 0.
        output_tokens: Written by it, >= 0.
        score: The member's own score of its answer, in [0, 1], such as its probability; None if not recorded.
        seconds: Time of the call; None if not recorded.

    Raises:
        ConfigError: A count or time is negative, or the score out of range.
    """

    query: str
    tier: str
    member: str
    label: str | None
    correct: bool
    input_tokens: int
    output_tokens: int
    score: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        who = f"answer of {self.tier}/{self.member} to {self.query}"
        for name in ("input_tokens", "output_tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{who}: expected {name} >= 0, got {value}")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ConfigError(f"{who}: expected score in [0, 1], got {self.score}")

    @property
    def tokens(self) -> int:
        """Read and written together."""
        return self.input_tokens + self.output_tokens


def normalised(text: str | None) -> str | None:
    """The form in which free answers are compared: Unicode NFKC, case folded, single spaces, no outer white space.

    Args:
        text: An answer; None for none.

    Returns:
        None where nothing is left: an empty answer is no answer, and agrees with none.
    """
    if text is None:
        return None
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()) or None


def parsed_label(text: str | None, labels: Sequence[str]) -> str | None:
    """Which label of a closed set a text states.

    Args:
        text: A model's answer.
        labels: The closed set, different after :func:`normalised`.

    Returns:
        The label, as it is spelled in the set, if the text states it in whole words and states no other one. A label
        inside a longer label does not count ("safe" in "not safe"). None otherwise.

    Raises:
        ConfigError: There are no labels, one is empty, or two are the same.
    """
    answer = normalised(text)
    pattern, spelled = _label_pattern(tuple(labels))
    stated = set(pattern.findall(answer)) if answer else set()
    return spelled[stated.pop()] if len(stated) == 1 else None


@lru_cache(maxsize=16)
def _label_pattern(labels: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    spelled = {form: label for label in labels if (form := normalised(label)) is not None}
    if not labels or len(spelled) < len(labels):
        raise ConfigError(
            f"labels: expected a set of different labels, got {', '.join(map(repr, labels)) or 'none'}"
        )
    longest_first = sorted(spelled, key=len, reverse=True)
    words = "|".join(re.escape(form) for form in longest_first)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)"), spelled
