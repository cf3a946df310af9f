"""Canaries and secrets: how well a model still knows a text that only one client had.

Axes: N candidates, one of them the canary.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError


def exposure(canary_loss: float, other_losses: np.ndarray) -> float:
    """How much a model prefers the canary to texts that it might have been: log₂ N - log₂ rank.

    Args:
        canary_loss: Loss of the canary, in nats, or any score that is lower for a likelier text.
        other_losses: Of the other candidates, drawn as the canary was; 10⁴ resolve 13 bits. [N - 1]

    Returns:
        Bits in [0, log₂ N]; N counts the canary. log₂ e = 1.44 on average for a canary that was never seen, and log₂ N
        if it is the likeliest of all. Ties count half, so a model that answers all alike exposes 1 bit, not all.

    Raises:
        ShapeError: There are no candidates, or a loss is not a number.

    Source:
        Carlini, Liu, Erlingsson, Kos, Song 2019, The secret sharer, with its estimate by sampling: rank among
        drawn candidates, not among all. Differs in ties.
    """
    if other_losses.ndim != 1 or not other_losses.size:
        raise ShapeError(f"exposure: expected losses [N - 1], got shape {list(other_losses.shape)}")
    if math.isnan(canary_loss) or np.isnan(other_losses).any():
        raise ShapeError("exposure: expected losses that are numbers, got others")
    better = int((other_losses < canary_loss).sum())
    tied = int((other_losses == canary_loss).sum())
    return math.log2(other_losses.size + 1) - math.log2(better + 1 + tied / 2)


def recovers(answer: str, secret: str) -> bool:
    """Whether an answer holds a secret as whole words, whatever the case and the blanks.

    Raises:
        ConfigError: The secret is blank, which every answer would hold.
    """
    words = secret.casefold().split()
    if not words:
        raise ConfigError("extraction: expected a secret, got a blank one")
    span = r"\s+".join(re.escape(word) for word in words)
    return re.search(rf"(?<!\w){span}(?!\w)", answer.casefold()) is not None


@dataclass(frozen=True)
class Extraction:
    """What an attacker got out of a model.

    Attributes:
        recovered: Secrets that were recovered, sorted.
        missed: The others, sorted.
        queries: How many were asked.
        curve: Secrets known after so many queries, from 0 queries on. [queries + 1]
    """

    recovered: tuple[str, ...]
    missed: tuple[str, ...]
    queries: int
    curve: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Share of the secrets that was recovered, in [0, 1]."""
        return len(self.recovered) / (len(self.recovered) + len(self.missed))


def count_extracted(answers: Sequence[str], secrets: Collection[str], budget: int) -> Extraction:
    """Count the secrets that answers give away, within a budget of queries.

    Every answer is searched for every secret: one that comes out when another was asked for is out all the same.

    Args:
        answers: In the order in which they were asked for; greedy, sampled, or from the stem of a secret.
        secrets: Exact spans.
        budget: Answers that count, >= 0; those behind it are not read.

    Raises:
        ConfigError: There are no secrets, one is blank, or the budget is negative.
    """
    if not secrets or budget < 0:
        raise ConfigError(
            f"extraction: expected secrets and a budget >= 0, got {len(secrets)} and {budget}"
        )
    known: set[str] = set()
    curve = [0]
    for answer in answers[:budget]:
        known |= {secret for secret in secrets if recovers(answer, secret)}
        curve.append(len(known))
    missed = tuple(sorted(set(secrets) - known))
    return Extraction(tuple(sorted(known)), missed, len(curve) - 1, tuple(curve))
