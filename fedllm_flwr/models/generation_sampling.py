"""How the next token of a row is chosen, the same in any batch.

Axes: b rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator

CANDIDATES = 256
"""Tokens that are looked at first for a nucleus; sorting a vocabulary costs as much as a small model."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the answers to one prompt are drawn.

    Attributes:
        max_new_tokens: Longest answer, at least 1.
        temperature: Divides the logits; 0 takes the most probable token, and then seeds change nothing.
        top_p: Probability of the nucleus, in (0, 1]: only the fewest most probable tokens that reach it are drawn.
        seeds: One for each answer. An answer depends on its own seed and on nothing else that is drawn.
        stop: Texts that end an answer and are cut off from it.
        first_rank: Which token the answer begins with: 0 as is drawn, 1 the second most probable one, and so on.
        scored: Whether the log-probability of each answer is wanted; it costs a pass over the logits of each token.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Holtzman et al. 2020 (The Curious Case of Neural Text Degeneration), section 3.1, for the nucleus.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seeds: tuple[int, ...] = (0,)
    stop: tuple[str, ...] = ()
    scored: bool = False
    first_rank: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", ">= 1", self.max_new_tokens >= 1),
            ("temperature", "a number >= 0", 0 <= self.temperature < float("inf")),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("seeds", "at least one", bool(self.seeds)),
            ("stop", "texts that are not empty", all(self.stop)),
            ("first_rank", ">= 0", self.first_rank >= 0),
        )
        for name, wanted, holds in checks:
            if not holds:
                raise ConfigError(
                    f"sampling {name}: expected {wanted}, got {getattr(self, name)!r}"
                )


class Chooser:
    """Chooses the tokens of one answer, one draw for each.

    Args:
        sampling: How.
        seed: Of this answer.
    """

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        self._draws: np.random.Generator = numpy_generator(seed, "tokens")
        self._rank = sampling.first_rank

    @property
    def takes_best(self) -> bool:
        """Whether the most probable token is next."""
        return self._sampling.temperature == 0 and not self._rank

    def choose(self, logits: Tensor) -> int:
        """Draw the next token from its logits [V], or take the first one of its rank."""
        if self._rank:
            rank, self._rank = self._rank, 0
            return int(logits.topk(rank + 1).indices[rank])
        # a temperature near zero, which float32 cannot hold, leaves the best token and no infinity
        temperature = max(self._sampling.temperature, torch.finfo(torch.float32).tiny)
        probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
        return draw(probabilities, self._sampling.top_p, float(self._draws.random()))


def draw(probabilities: Tensor, top_p: float, uniform: float) -> int:
    """A token of the nucleus by the inverse of its distribution function.

    The function is summed in the order of token ids and not of probabilities: two nearly equal probabilities may
    change places when another batch rounds them otherwise, token ids do not.

    Args:
        probabilities: [V], sum 1.
        top_p: Of the nucleus.
        uniform: A draw from [0, 1).
    """
    tokens = nucleus(probabilities, top_p) if top_p < 1 else None
    kept = probabilities if tokens is None else probabilities[tokens]
    summed = kept.double().cumsum(0)
    place = int(torch.searchsorted(summed, uniform * float(summed[-1]), right=True))
    place = min(place, len(summed) - 1)
    return place if tokens is None else int(tokens[place])


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest most probable tokens whose probability reaches ``top_p``, in the order of their ids.

    Args:
        probabilities: [V], sum 1.
        top_p: In (0, 1).
    """
    for count in (min(CANDIDATES, len(probabilities)), len(probabilities)):
        values, tokens = probabilities.topk(count)
        before = values.double().cumsum(0) - values
        if before[-1] >= top_p:
            break
    return tokens[before < top_p].sort().values


def choose(choosers: Sequence[Chooser], logits: Tensor) -> list[int]:
    """The next token of each row.

    Args:
        choosers: Of the rows.
        logits: [b, V].
    """
    best = logits.argmax(1).tolist()
    return [
        own if chooser.takes_best else chooser.choose(row)
        for chooser, own, row in zip(choosers, best, logits, strict=True)
    ]
