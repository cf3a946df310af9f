"""Turn rows into token ids, the positions that predict, and what they should predict.

Axes: t = input tokens of one row, n = its target tokens. Token ids and positions are int32.

Two losses are possible. ``labels`` scores only the first token of each label's word at the last position of
the prompt: one row of the language model's head for each label. ``vocabulary`` predicts every target
token over the whole vocabulary. Both read the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Row, Task, Template
from fedllm_flwr.tasks.prompts import Prompt, Tokenizer

Loss = Literal["labels", "vocabulary"]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row, ready for a model.

    Attributes:
        row_id: The row's own.
        input_ids: The prompt and all target tokens but the last, which is never read. [t]
        predict_from: Positions whose final hidden states predict the targets, in order. [n]
        targets: The label's index (loss ``labels``, n = 1) or token ids (loss ``vocabulary``). [n]
        label: The row's label, -1 for none.
        characters: Length of the target text that the target tokens stand for, >= 1.
    """

    row_id: str
    input_ids: np.ndarray
    predict_from: np.ndarray
    targets: np.ndarray
    label: int
    characters: int


class Encoder:
    """Encodes the rows of one task with one template; made by :func:`build_encoder`.

    Attributes:
        head_token_ids: The rows of the language model's head that the loss is restricted to, in
            label order; None = the full vocabulary.
        label_token_ids: First token of each label's word, in label order: the tokens whose scores
            decide a prediction under either loss; None for a task without labels.
    """

    def __init__(
        self, task: Task, tokenizer: Tokenizer, template: Template, *, loss: Loss, max_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._loss = loss
        self._ends = task.kind == "instruction" and tokenizer.eos_token_id is not None
        self._prompt = Prompt(template, tokenizer)
        question = len(self._prompt.before) + len(self._prompt.after)
        self._room = max_tokens - question
        if self._room < 1:
            raise ConfigError(
                f"task.max_tokens: expected more than the {question} tokens that template "
                f"{template.name} of task {task.name} takes without a text, got {max_tokens}"
            )
        self.label_token_ids = _label_tokens(task, self._prompt) if task.label_words else None
        self.head_token_ids = self.label_token_ids if loss == "labels" else None
        self._cache: dict[str, Encoded] = {}

    @property
    def fixed_ids(self) -> tuple[int, ...]:
        """Token ids that every row begins with: leading special tokens and the question up to the row's text."""
        return tuple(self._prompt.before)

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """The rows' encodings, in order; each row is tokenised once in the encoder's life.

        Args:
            rows: Rows of the encoder's task.

        Returns:
            One encoding for each row, with at most ``max_tokens`` input tokens.
        """
        fresh = [row for row in rows if row.row_id not in self._cache]
        texts = self._prompt.text_tokens([row.text for row in fresh])
        for row, text in zip(fresh, texts, strict=True):
            encode = self._for_labels if self._loss == "labels" else self._for_vocabulary
            self._cache[row.row_id] = encode(row, text)
        return [self._cache[row.row_id] for row in rows]

    def _for_labels(self, row: Row, text: list[int]) -> Encoded:
        label = -1 if row.label is None else row.label
        return self._assemble(row, text[: self._room], [label], len(row.target), read=[])

    def _for_vocabulary(self, row: Row, text: list[int]) -> Encoded:
        target = self._prompt.answer_tokens(row.target)
        if self._ends:
            target = [*target, self._tokenizer.eos_token_id]
        room = self._room + 1  # the last target token takes none
        text = text[: max(room - len(target), min(len(text), room // 2))]
        kept = target[: room - len(text)]
        characters = len(row.target)
        if len(kept) < len(target):
            characters = max(1, min(characters, len(self._tokenizer.decode(kept))))
        return self._assemble(row, text, kept, characters, read=kept[:-1])

    def _assemble(
        self, row: Row, text: list[int], targets: list[int], characters: int, *, read: list[int]
    ) -> Encoded:
        prompt = [*self._prompt.before, *text, *self._prompt.after]
        last = len(prompt) - 1
        return Encoded(
            row_id=row.row_id,
            input_ids=np.array([*prompt, *read], dtype=np.int32),
            predict_from=np.arange(last, last + len(targets), dtype=np.int32),
            targets=np.array(targets, dtype=np.int32),
            label=-1 if row.label is None else row.label,
            characters=characters,
        )


def build_encoder(
    task: Task, tokenizer: Tokenizer, *, template: str = "", loss: Loss, max_tokens: int
) -> Encoder:
    """Prepare to encode a task's rows.

    Args:
        task: The task whose rows will be encoded.
        tokenizer: The model's tokenizer; only the methods of
            :class:`fedllm_flwr.tasks.prompts.Tokenizer` are used.
        template: Name of one of the task's templates; empty = its default.
        loss: ``labels`` or ``vocabulary``; see the module's description.
        max_tokens: Longest input. The end of the row's text gives way first, down to half of what
            the question leaves; then the end of a free-text target. The question and the answer
            cue are never cut.

    Raises:
        ConfigError: The template is unknown or does not fit into ``max_tokens``; the loss does not
            fit the task; or the words of two labels begin with the same token.
    """
    if loss not in ("labels", "vocabulary"):
        raise ConfigError(f"task.loss: expected labels or vocabulary, got {loss!r}")
    if loss == "labels" and task.kind == "instruction":
        raise ConfigError(
            f"task.loss=labels and task {task.name}: its rows have no labels, use vocabulary"
        )
    return Encoder(task, tokenizer, task.template(template), loss=loss, max_tokens=max_tokens)


def _label_tokens(task: Task, prompt: Prompt) -> tuple[int, ...]:
    owners: dict[int, str] = {}
    for word in task.label_words:
        first = prompt.answer_tokens(word)[0]
        if first in owners:
            raise ConfigError(
                f"task {task.name}: labels {owners[first]!r} and {word!r} begin with the same "
                f"token of this tokenizer; expected label words that differ in their first token"
            )
        owners[first] = word
    return tuple(owners)
