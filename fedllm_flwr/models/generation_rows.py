"""One answer while it grows: its tokens, its text, and why it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm_flwr.models.generation_sampling import Chooser, Sampling

Finish = Literal["stop", "length", "cancelled"]
Listener = Callable[[int, int, str], bool]
"""Called after each token of an answer with the index of its prompt, its own among the answers to that prompt, and its
text so far, as far as no later token can change it. What it returns says whether to go on with the answer."""
_UNFINISHED = "\ufffd"
"""What a tokenizer puts for the first bytes of a character whose last ones have not come."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer.

    Attributes:
        token_ids: Generated tokens, without the one that ended it; a stop text is among them.
        text: What they say, without special tokens and cut before a stop text.
        finish: ``stop``: the model ended it or wrote a stop text; ``length``: it has ``max_new_tokens``;
            ``cancelled``: the listener gave it up.
        output_tokens: Tokens that were computed, with the one that ended it.
        log_probability: Of these tokens together, in nats, at temperature 1 and over the whole vocabulary; None unless
            it was asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    output_tokens: int
    log_probability: float | None = None


class Row:
    """An answer in the batch.

    Args:
        place: Index of its prompt, and its own among the answers to that prompt.
        sampling: How it is drawn.
        tokenizer: Of the model.
        stop_ids: Tokens that end an answer.
        listener: Told after every token, if there is one.
    """

    def __init__(
        self,
        place: tuple[int, int],
        sampling: Sampling,
        tokenizer: Any,
        stop_ids: frozenset[int],
        listener: Listener | None,
    ) -> None:
        self.place = place
        self.chooser = Chooser(sampling, sampling.seeds[place[1]])
        self.finish: Finish | None = None
        self._sampling, self._tokenizer = sampling, tokenizer
        self._stop_ids, self._listener = stop_ids, listener
        self._tokens: list[int] = []
        self._computed = 0
        self._log_probability = 0.0

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self._sampling.scored

    def take(self, token: int, log_probability: float = 0.0) -> None:
        """Add a token, and end the answer if it is the last one.

        Args:
            token: The token.
            log_probability: Its own, in nats.
        """
        self._computed += 1
        self._log_probability += log_probability
        if token in self._stop_ids:
            self.finish = "stop"
        else:
            self._tokens.append(token)
            if self._sampling.stop and find_stop(self._decoded(), self._sampling.stop) >= 0:
                self.finish = "stop"
            elif len(self._tokens) == self._sampling.max_new_tokens:
                self.finish = "length"
        if self._listener is not None:
            text = self._text() if self.finish else settled(self._decoded(), self._sampling.stop)
            if not self._listener(*self.place, text) and self.finish is None:
                self.finish = "cancelled"

    def sample(self) -> Sample:
        """The answer; cancelled if it has not ended."""
        return Sample(
            tuple(self._tokens),
            self._text(),
            self.finish or "cancelled",
            self._computed,
            self._log_probability if self.scored else None,
        )

    def _text(self) -> str:
        text = self._decoded()
        found = find_stop(text, self._sampling.stop)
        return text if found < 0 else text[:found]

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


def find_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first stop text begins; -1 if there is none."""
    return min((place for own in stop if (place := text.find(own)) >= 0), default=-1)


def settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of an unfinished answer that stays as it is, whatever follows.

    Args:
        text: So far, without a stop text.
        stop: Texts that would be cut off.

    Returns:
        Without half a character, and without what may become a stop text, at its end.
    """
    text = text.rstrip(_UNFINISHED)
    held = max(
        (
            size
            for own in stop
            for size in range(1, min(len(own), len(text) + 1))
            if text.endswith(own[:size])
        ),
        default=0,
    )
    return text[: len(text) - held]
