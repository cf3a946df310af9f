"""The server's half of the split model: what clients' prompts are held against, whole cohorts at a time.

Axes: B rows of a call, m tokens of a prompt, d width of the model's embeddings, K label words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_flwr.averaging.checks import check_values
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import WireError
from fedllm_flwr.models import backbone as backbones
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.shapes import model_config
from fedllm_flwr.reservoir import SurrogateLM
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedResPromptConfig
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.training.server_half import Placement, ServerHalf
from fedllm_flwr.training.server_texts import keys_of
from strategies.exchange import ClientReply, checked_number

ROWS_PER_PASS = 64
"""Bounds the server's memory; passes of fewer rows are slower, of more hardly faster."""
PLACEMENTS: dict[str, Placement] = {
    "prompt_before": "before_text",
    "prompt_after": "after_text",
}


@dataclass(frozen=True, eq=False)
class Prompts:
    """What one client sent for some rows, checked.

    Attributes:
        partition_id: The client.
        values: [B, m, d]
        targets: Places in the list of label words, int64 [B]; None where they stay with the client.
        texts: Each row's tokens where the server reads them.
    """

    partition_id: int
    values: Tensor
    targets: Tensor | None
    texts: tuple[tuple[int, ...], ...] | None


class Half(Protocol):
    """A frozen model behind prompts: the real one or its surrogate."""

    def logits(self, prompts: Tensor) -> Tensor:
        """Class logits [B, K] of prompts [B, m, d]."""

    def loss_and_gradient(self, prompts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B] and their gradients [B, m, d]."""

    def gradient_from_logit_slope(self, prompts: Tensor, slope: Tensor) -> Tensor:
        """Gradient [B, m, d] from slopes [B, K]."""


class PromptServer:
    """The model that a server holds, loaded when it is first asked something.

    Args:
        config: The run.
        task: Its task; the server reads the label words of it.
        shape: m and d.
    """

    def __init__(self, config: RunConfig, task: Task, shape: tuple[int, int]) -> None:
        method = config.method
        assert isinstance(method, FedResPromptConfig)  # noqa: S101  # the table of strategies says so
        self._config, self._method, self._task, self._shape = config, method, task, shape

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self._task.label_words)

    def checked(self, reply: ClientReply, part: str, facts: Any, *, least: int = 0) -> Prompts:
        """One client's prompts, checked before anything of them counts.

        Args:
            reply: The client's.
            part: Which of its parts.
            facts: What it says of the rows: ``rows``, and as the mode asks ``targets`` and ``texts``.
            least: Rows that there must be.

        Raises:
            WireError: The width or the number of the prompts, a target or a text is not right.
        """
        client = f"client {reply.partition_id}"
        if not isinstance(facts, dict) or part not in reply.parts:
            raise WireError(f"{client}: expected prompts {part!r}, got {sorted(reply.parts)}")
        rows = checked_number(client, facts, "rows", whole=True)
        values, (length, width) = reply.parts[part], self._shape
        if rows < least or values.size != rows * length * width:
            raise WireError(
                f"{client}, part {part}: expected prompts of {length} tokens of width {width} for at least "
                f"{least} rows, got {values.size} values for {rows}"
            )
        check_values(values, f"{client}, part {part}")
        targets = None
        if self._method.mode != "label_private":
            targets = self._checked_targets(client, facts.get("targets"), rows)
        texts = None
        if self._method.server_text != "none":
            texts = self._checked_texts(client, facts.get("texts"), rows)
        prompts = torch.from_numpy(values.copy()).view(rows, length, width)
        return Prompts(reply.partition_id, prompts, targets, texts)

    def losses_and_gradients(self, batch: Sequence[Prompts]) -> list[tuple[Tensor, Tensor]]:
        """Of each client's rows the losses in nats [B] and the gradients of each loss by its prompt [B, m, d].

        The rows of all clients are computed together.
        """
        whole = _together(batch)
        assert whole.targets is not None  # noqa: S101  # label_private has no losses here
        targets = whole.targets
        losses, gradients = [], []
        for rows in self._passes(whole):
            half = self._half(whole, rows)
            loss, gradient = half.loss_and_gradient(whole.values[rows], targets[rows])
            losses.append(loss.detach())
            gradients.append(gradient.detach())
        counts = [len(own.values) for own in batch]
        return list(
            zip(torch.cat(losses).split(counts), torch.cat(gradients).split(counts), strict=True)
        )

    def logits(self, batch: Sequence[Prompts]) -> list[Tensor]:
        """Of each client's rows the logits of the label words [B, K], computed together."""
        whole = _together(batch)
        found = [torch.empty(0, self.num_classes)]
        for rows in self._passes(whole):
            found.append(self._half(whole, rows).logits(whole.values[rows]).detach().float().cpu())
        return list(torch.cat(found).split([len(own.values) for own in batch]))

    def gradients(self, batch: Sequence[Prompts], slopes: Sequence[Tensor]) -> list[Tensor]:
        """Of each client's rows the gradients [B, m, d], from slopes [B, K] of losses that the server never sees."""
        whole, slope = _together(batch), torch.cat(list(slopes))
        found = [
            self._half(whole, rows).gradient_from_logit_slope(whole.values[rows], slope[rows])
            for rows in self._passes(whole)
        ]
        return list(torch.cat(found).detach().split([len(own.values) for own in batch]))

    def _passes(self, whole: Prompts) -> list[slice]:
        return [
            slice(first, first + ROWS_PER_PASS)
            for first in range(0, len(whole.values), ROWS_PER_PASS)
        ]

    @cached_property
    def _model(self) -> tuple[Backbone, tuple[int, ...] | None]:
        """The frozen model and the tokens of the label words."""
        runtime, task = self._config.runtime, self._config.task
        backbone = backbones.load(
            self._config.model.ref(runtime.model_path),
            dtype=runtime.dtype,
            device=runtime.device,
            threads=runtime.threads,
            max_tokens=task.max_tokens,
        )
        encoder = build_encoder(
            self._task,
            backbone.tokenizer,
            template=task.template,
            loss=task.loss,
            max_tokens=task.max_tokens,
        )
        return backbone, encoder.label_token_ids

    @cached_property
    def _without_text(self) -> Half:
        if self._method.server_model == "surrogate":
            seed = derive_seed(self._config.seed, "surrogate")
            return SurrogateLM(self.num_classes, self._shape[1], seed=seed)
        backbone, words = self._model
        return ServerHalf(backbone, token_ids=words)

    def _half(self, whole: Prompts, rows: slice) -> Half:
        """The model for some of the rows; what it computes of their texts is kept for the next time."""
        if whole.texts is None:
            return self._without_text
        backbone, words = self._model
        placement = PLACEMENTS[self._method.server_text]
        texts = whole.texts[rows]
        with_keys = keys_of(backbone).kept
        return ServerHalf(
            backbone, token_ids=words, text_ids=texts, placement=placement, with_keys=with_keys
        )

    def _checked_targets(self, client: str, targets: Any, rows: int) -> Tensor:
        if not isinstance(targets, list) or len(targets) != rows:
            raise WireError(f"{client}: expected {rows} targets, got {targets!r:.60}")
        for target in targets:
            if type(target) is not int or not 0 <= target < self.num_classes:
                raise WireError(
                    f"{client}: expected targets in [0, {self.num_classes}), got {target!r:.60}"
                )
        return torch.tensor(targets, dtype=torch.int64)

    def _checked_texts(self, client: str, texts: Any, rows: int) -> tuple[tuple[int, ...], ...]:
        most, ref = (
            self._config.task.max_tokens,
            self._config.model.ref(self._config.runtime.model_path),
        )
        vocabulary = model_config(ref).get_text_config(decoder=True).vocab_size
        if not isinstance(texts, list) or len(texts) != rows:
            raise WireError(f"{client}: expected {rows} texts, got {texts!r:.60}")
        for text in texts:
            if not isinstance(text, list) or not 0 < len(text) <= most:
                raise WireError(f"{client}: expected texts of 1 to {most} tokens, got {text!r:.60}")
            if not all(type(token) is int and 0 <= token < vocabulary for token in text):
                raise WireError(f"{client}: expected tokens below {vocabulary}, got {text!r:.60}")
        return tuple(tuple(text) for text in texts)


def _together(batch: Sequence[Prompts]) -> Prompts:
    """The rows of all clients, one after the other."""
    targets = [own.targets for own in batch if own.targets is not None]
    texts = [text for own in batch if own.texts is not None for text in own.texts]
    return Prompts(
        -1,
        torch.cat([own.values for own in batch]),
        torch.cat(targets) if targets else None,
        tuple(texts) if texts else None,
    )
