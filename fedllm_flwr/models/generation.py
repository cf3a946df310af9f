"""Text from the frozen model: prompts in one batch, what they share computed once.

Three things are computed once and not for every row: the keys and values of an adapter's soft prompt, of the tokens
that all prompts of a batch begin with, and of a prompt that several answers are drawn for. In float32 the answers are
those that each prompt gets alone.

Axes: b rows of a batch, t tokens, d hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation_attention import generation_kernels
from fedllm_flwr.models.generation_batch import CachedRows
from fedllm_flwr.models.generation_rows import Finish, Listener, Row, Sample
from fedllm_flwr.models.generation_sampling import Sampling, choose
from fedllm_flwr.models.generation_start import (
    Adaptation,
    KeysAndValues,
    start_of,
    window_of,
)

__all__ = [
    "Adaptation",
    "Answers",
    "Finish",
    "Generator",
    "Listener",
    "Query",
    "Sample",
    "Sampling",
]

BATCH_POSITIONS = 8192
"""Columns of keys and values over all rows of a batch; in float32 SmolLM2-135M keeps 46 kB for each."""
MIN_SHARED_TOKENS = 8
"""A shorter common beginning is not worth a pass of its own."""


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt and how it is to be answered.

    Attributes:
        token_ids: The whole prompt, without soft tokens.
        sampling: How, and how many answers.
    """

    token_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to one query.

    Attributes:
        samples: One for each seed, in their order.
        input_tokens: Tokens of the prompt.
    """

    samples: tuple[Sample, ...]
    input_tokens: int

    @property
    def output_tokens(self) -> int:
        """Tokens computed for all answers."""
        return sum(sample.output_tokens for sample in self.samples)


class Generator:
    """A frozen model with what a run has added to it; one thread at a time may use it.

    Attributes:
        backbone: The model.
        stop_ids: Tokens that end an answer.

    Args:
        backbone: The model.
        adaptation: What is added.
        stop_ids: By default all that the model's and the tokenizer's settings name.

    Raises:
        ConfigError: The model keeps something else than keys and values of its tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        adaptation: Adaptation | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
    ) -> None:
        self.backbone = backbone
        self.stop_ids = end_tokens(backbone) if stop_ids is None else stop_ids
        self._adaptation = adaptation or Adaptation()
        self._window = window_of(backbone)
        self._start: KeysAndValues | None = None

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Tokens that every prompt has to begin with."""
        return self._adaptation.leading_ids

    def check(self, query: Query) -> None:
        """Refuse a query that cannot be answered.

        Raises:
            ConfigError: The prompt has no token of its own, does not begin with the text that the soft prompt stands
                behind, or does not fit into the context window together with its longest answer.
        """
        leading, prompt = self.leading_ids, query.token_ids
        if prompt[: len(leading)] != leading:
            raise ConfigError(
                f"prompt: expected it to begin with the {len(leading)} tokens of the fixed text behind which the "
                f"soft prompt stands, got other tokens"
            )
        if len(prompt) <= len(leading):
            raise ConfigError("prompt: expected at least one token of its own, got none")
        config = self.backbone.model.config.get_text_config(decoder=True)
        window = getattr(config, "max_position_embeddings", None)
        soft = getattr(self._adaptation.spec, "length", 0)
        needed = soft + len(prompt) + query.sampling.max_new_tokens
        if window is not None and needed > window:
            raise ConfigError(
                f"prompt: expected at most the {window} positions of the model's context window, got "
                f"{soft + len(prompt)} for the prompt and {query.sampling.max_new_tokens} for its answer"
            )

    @torch.no_grad()
    def generate(
        self,
        queries: Sequence[Query],
        listener: Listener | None = None,
        *,
        share_prefix: bool = True,
    ) -> list[Answers]:
        """Answer queries.

        Args:
            queries: In any number; they are put into batches of at most ``BATCH_POSITIONS`` columns.
            listener: Told after every token.
            share_prefix: Whether tokens that all prompts of a batch begin with are computed once.

        Returns:
            Answers in the order of the queries.

        Raises:
            ConfigError: A query cannot be answered, see :meth:`check`; none is then begun.
        """
        for query in queries:
            self.check(query)
        tokenizer = self.backbone.tokenizer
        rows = [
            [
                Row((i, j), query.sampling, tokenizer, self.stop_ids, listener)
                for j in range(len(query.sampling.seeds))
            ]
            for i, query in enumerate(queries)
        ]
        with self.computing():
            for members in self._batches(queries):
                prompts = [queries[i].token_ids[len(self.leading_ids) :] for i in members]
                self._answer(prompts, [rows[i] for i in members], share_prefix)
        return [
            Answers(tuple(row.sample() for row in own), len(query.token_ids))
            for own, query in zip(rows, queries, strict=True)
        ]

    @contextmanager
    def computing(self) -> Iterator[KeysAndValues]:
        """The model as the run has left it; gives what stands before every prompt, computed once."""
        with generation_kernels(self.backbone), self._adaptation.active(self.backbone):
            if self._start is None:
                self._start = start_of(self.backbone, self._adaptation)
            yield self._start

    def _batches(self, queries: Sequence[Query]) -> Iterator[list[int]]:
        """Queries that are computed together, of similar length.

        Where padding would push tokens out of a sliding window, each query is alone.
        """
        start = self._start[0][0].shape[2] if self._start else 0
        batch: list[int] = []
        count = 0
        by_length = sorted(range(len(queries)), key=lambda i: len(queries[i].token_ids))
        for i in by_length:
            longest_answer = max(queries[k].sampling.max_new_tokens for k in [*batch, i])
            columns = start + len(queries[i].token_ids) + longest_answer
            count += len(queries[i].sampling.seeds)
            fits = self._window is None or columns <= self._window
            if batch and (count * columns > BATCH_POSITIONS or not fits):
                yield batch
                batch, count = [], len(queries[i].sampling.seeds)
            batch.append(i)
        if batch:
            yield batch

    def _answer(
        self, prompts: list[tuple[int, ...]], rows: list[list[Row]], share_prefix: bool
    ) -> None:
        """Let all rows of one batch grow to their ends."""
        state, logits = self._read(prompts, share_prefix)
        prompt_of = [k for k, own in enumerate(rows) for _ in own]
        state.select(prompt_of)
        logits = logits[prompt_of]
        growing = [row for own in rows for row in own]
        while True:
            tokens = choose([row.chooser for row in growing], logits)
            for row, token, own in zip(
                growing, tokens, _log_probabilities(growing, logits, tokens), strict=True
            ):
                row.take(token, own)
            kept = [k for k, row in enumerate(growing) if row.finish is None]
            if not kept:
                return
            if len(kept) < len(growing):
                state.select(kept)
                growing = [growing[k] for k in kept]
            logits = state.step(torch.tensor([[tokens[k]] for k in kept]))

    def _read(
        self, prompts: list[tuple[int, ...]], share_prefix: bool
    ) -> tuple[CachedRows, Tensor]:
        """Compute the prompts; logits [b, V] of the token after each."""
        common = common_length(prompts) if share_prefix and len(prompts) > 1 else 0
        if common < MIN_SHARED_TOKENS:
            common = 0
        state = CachedRows(self.backbone, self._start or ())
        if common:
            state.read(torch.tensor([prompts[0][:common]]))
        if len(prompts) > 1:
            state.repeat(len(prompts))
        longest = max(len(prompt) for prompt in prompts) - common
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for k, prompt in enumerate(prompts):
            own = torch.tensor(prompt[common:])
            ids[k, longest - len(own) :] = own
            mask[k, longest - len(own) :] = 1
        return state, state.step(ids, mask)


def _log_probabilities(rows: Sequence[Row], logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Of each row's token, in nats; zeros where no row wants them."""
    if not any(row.scored for row in rows):
        return [0.0] * len(rows)
    chosen = logits[torch.arange(len(rows)), torch.tensor(tokens)]
    found: list[float] = (chosen - logits.logsumexp(dim=1)).tolist()
    return found


def common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with; at least one of each is left."""
    first, last = min(prompts), max(prompts)  # in dictionary order all others lie between them
    shortest = min(len(prompt) for prompt in prompts)
    pairs = zip(first, last, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), shortest)
    return min(same, shortest - 1)


def end_tokens(backbone: Backbone) -> frozenset[int]:
    """Tokens that end an answer, by the settings of the model, of its generation, and of its tokenizer."""
    model = backbone.model
    named = (
        backbone.tokenizer.eos_token_id,
        model.config.get_text_config(decoder=True).eos_token_id,
        getattr(model.generation_config, "eos_token_id", None),
    )
    found: set[int] = set()
    for value in named:
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)
