"""What the server asks for answers: one interface, and the model of one run behind it.

A cascade of several models can stand behind the same interface.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Finish, Generator, Listener, Query, Sampling
from fedllm_flwr.serving.rendering import Turn, encode_text


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, as text.

    Attributes:
        content: The turns of a chat, or a plain text to be continued.
        sampling: How, and how many answers.
    """

    content: tuple[Turn, ...] | str
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers to one request and what they took.

    Attributes:
        texts: One for each seed.
        finishes: Why each of them ended.
        input_tokens: Of the prompt, over everything that read it.
        output_tokens: Computed for all answers, those included that were not given.
        tier: Who gave the answers.
        agreement: How far the members of that tier agreed, 0 to 1; None where nobody was compared.
        cost: In the price's units; tokens where there is no price.
    """

    texts: tuple[str, ...]
    finishes: tuple[Finish, ...]
    input_tokens: int
    output_tokens: int
    tier: str
    agreement: float | None
    cost: float


class Answerer(Protocol):
    """Answers requests."""

    @property
    def name(self) -> str:
        """What clients call it."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """Who may answer."""

    def check(self, ask: Ask) -> None:
        """Refuse a request that cannot be answered; called in the event loop, while others are answered.

        Raises:
            ConfigError: Says why.
        """

    def answer(self, asks: Sequence[Ask], listener: Listener) -> list[Reply]:
        """Answer requests that :meth:`check` let through, in their order; called in one thread."""


class SingleModel:
    """One model with one adapter.

    Attributes:
        name: What clients call it, and the name of its only tier.

    Args:
        name: As above.
        generator: The model.
        encode_chat: Token ids of a chat, with a tokenizer.
        max_context_tokens: Of a prompt and its longest answer.
    """

    def __init__(
        self,
        name: str,
        generator: Generator,
        encode_chat: Callable[[Sequence[Turn], Any], list[int]],
        *,
        max_context_tokens: int,
    ) -> None:
        self.name = name
        self._generator = generator
        self._encode_chat = encode_chat
        self._max_context = max_context_tokens
        self._tokenizer = generator.backbone.tokenizer
        self._outside = copy.deepcopy(self._tokenizer)  # a tokenizer serves one thread at a time

    @property
    def tiers(self) -> tuple[str, ...]:
        """Itself."""
        return (self.name,)

    def check(self, ask: Ask) -> None:
        """See :meth:`Answerer.check`."""
        query = self._query(ask, self._outside)
        needed = len(query.token_ids) + ask.sampling.max_new_tokens
        if needed > self._max_context:
            raise ConfigError(
                f"prompt: expected at most {self._max_context} tokens with its answer, got {len(query.token_ids)} "
                f"and {ask.sampling.max_new_tokens} for the answer"
            )
        self._generator.check(query)

    def answer(self, asks: Sequence[Ask], listener: Listener) -> list[Reply]:
        """See :meth:`Answerer.answer`."""
        queries = [self._query(ask, self._tokenizer) for ask in asks]
        return [
            Reply(
                texts=tuple(sample.text for sample in found.samples),
                finishes=tuple(sample.finish for sample in found.samples),
                input_tokens=found.input_tokens,
                output_tokens=found.output_tokens,
                tier=self.name,
                agreement=None,
                cost=float(found.input_tokens + found.output_tokens),
            )
            for found in self._generator.generate(queries, listener)
        ]

    def _query(self, ask: Ask, tokenizer: Any) -> Query:
        if isinstance(ask.content, str):
            ids = encode_text(ask.content, tokenizer, self._generator.leading_ids)
        else:
            ids = self._encode_chat(ask.content, tokenizer)
        return Query(tuple(ids), ask.sampling)
