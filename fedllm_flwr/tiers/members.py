"""A member of a tier that computes on this machine: a frozen model with what a run has added to it.

Where a task has labels they are scored, and the answer is the most probable one; nothing has to be parsed. Where it
has none the answer is generated.

Axes: n rows, K labels, k samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models import backbone as backbones
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Adaptation, Generator, Query, Sample, Sampling
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.prompts import PromptSpec
from fedllm_flwr.seeding import derive_seed, numpy_generator
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.tasks.prompts import Prompt
from fedllm_flwr.training.evaluate import scores


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of one member to one query.

    Attributes:
        text: The label's word, or free text; None if nothing could be parsed.
        input_tokens: Read for it, soft tokens included; 0 for further samples of one prompt, which is read once.
        output_tokens: Written for it; a scored label counts 1.
        score: Probability of the label among all labels; of free text the geometric mean of its tokens' probabilities;
            None for endpoints.
    """

    text: str | None
    input_tokens: int
    output_tokens: int
    score: float | None = None


@dataclass(frozen=True)
class Asking:
    """How a member is asked.

    Attributes:
        samples: Answers to each query, k.
        temperature: Of the samples; 0 takes the most probable answer.
        max_new_tokens: Longest free text.
        seed: Of the samples; with the row's name it decides each of them, whatever else is asked.
        first_rank: Of free text, which token it begins with: 1 the second most probable one, and so on.
    """

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 16
    seed: int = 0
    first_rank: int = 0

    def seeds(self, row: Row) -> tuple[int, ...]:
        """Of a row's samples."""
        return tuple(derive_seed(self.seed, row.row_id, number) for number in range(self.samples))


@dataclass(frozen=True)
class Computing:
    """Where members compute; as in :func:`fedllm_flwr.models.backbone.load`."""

    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1


@dataclass(frozen=True, eq=False)
class LocalMember:
    """A model, what was added to it, and how it is asked.

    Attributes:
        name: In recorded answers.
        ref: The frozen model.
        template: Name of one of the task's templates; empty = its first.
        max_tokens: Longest question.
        prompt: A soft prompt's values, float32.
        spec: Of the prompt; None without one.
        delta: An update of the model's weights; None without one.
        fixed_ids: The text that the prompt was trained behind.
        computing: Where.
    """

    name: str
    ref: ModelRef
    template: str = ""
    max_tokens: int = 128
    prompt: np.ndarray | None = None
    spec: PromptSpec | PeftPromptSpec | None = None
    delta: Delta | None = None
    fixed_ids: tuple[int, ...] = ()
    computing: Computing = field(default_factory=Computing)

    @property
    def soft_tokens(self) -> int:
        """Positions that the soft prompt takes."""
        return self.spec.length if self.spec is not None else 0

    def backbone(self) -> Backbone:
        """The frozen model, one in a process for all members that share it."""
        where = self.computing
        return backbones.load(
            self.ref,
            dtype=where.dtype,
            device=where.device,
            threads=where.threads,
            max_tokens=self.max_tokens,
        )

    def ask(self, task: Task, rows: Sequence[Row], asking: Asking) -> list[tuple[Reply, ...]]:
        """Answer queries.

        Args:
            task: The queries' task; its labels and templates are read, its rows are not.
            rows: Queries with unique names; their targets are not read.
            asking: How.

        Returns:
            For each row ``asking.samples`` answers. [n][k]

        Raises:
            ConfigError: The task's labels or template do not suit the model.
            ShapeError: What was added does not fit the model, or was trained behind another text.
        """
        if not rows:
            return []
        labels = task.kind == "classification"
        return self._labels(task, rows, asking) if labels else self._texts(task, rows, asking)

    def _labels(self, task: Task, rows: Sequence[Row], asking: Asking) -> list[tuple[Reply, ...]]:
        backbone = self.backbone()
        encoder = build_encoder(
            task,
            backbone.tokenizer,
            template=self.template,
            loss="labels",
            max_tokens=self.max_tokens,
        )
        encoded = encoder.encode(rows)
        assert encoder.label_token_ids is not None  # noqa: S101  # the task has labels
        found = scores(
            backbone,
            encoded,
            label_token_ids=encoder.label_token_ids,
            adapter=self.prompt,
            spec=self.spec,
            delta=self.delta,
            fixed_ids=self.fixed_ids,
        )
        answers = []
        for row, tokens, values in zip(rows, encoded, found, strict=True):
            read = len(tokens.input_ids) + self.soft_tokens
            chosen = chosen_labels(values, asking, row)
            answers.append(
                tuple(
                    Reply(
                        task.label_words[label],
                        0 if number else read,
                        1,
                        min(1.0, float(np.exp(values[label]))),
                    )
                    for number, label in enumerate(chosen)
                )
            )
        return answers

    def _texts(self, task: Task, rows: Sequence[Row], asking: Asking) -> list[tuple[Reply, ...]]:
        backbone = self.backbone()
        prompt = Prompt(task.template(self.template), backbone.tokenizer)
        question = len(prompt.before) + len(prompt.after)
        room = self.max_tokens - question
        if room < 1:
            raise ConfigError(
                f"member {self.name}: expected more than the {question} tokens that its template takes without a "
                f"text, got max_tokens {self.max_tokens}"
            )
        added = Adaptation(self.prompt, self.spec, self.delta, self.fixed_ids)
        queries = [
            Query(
                (*prompt.before, *text[:room], *prompt.after),
                Sampling(
                    max_new_tokens=asking.max_new_tokens,
                    temperature=asking.temperature,
                    seeds=asking.seeds(row),
                    scored=True,
                    first_rank=asking.first_rank,
                ),
            )
            for row, text in zip(rows, prompt.text_tokens([row.text for row in rows]), strict=True)
        ]
        return [
            tuple(
                Reply(
                    said(sample.text, task),
                    0 if number else answer.input_tokens + self.soft_tokens,
                    sample.output_tokens,
                    mean_probability(sample),
                )
                for number, sample in enumerate(answer.samples)
            )
            for answer in Generator(backbone, added).generate(queries)
        ]


def said(text: str, task: Task) -> str | None:
    """What of a written text is the answer: its first word where the task asks for one, else all; None if nothing."""
    words = text.split()[:1] if task.one_word else [text.strip()]
    return (words[0] if words else "") or None


def mean_probability(sample: Sample) -> float | None:
    """The geometric mean of the probabilities of a text's tokens, its end included; None where they are not known.

    Source:
        Length-normalised sequence probability: Malinin and Gales 2021, Uncertainty estimation in autoregressive
        structured prediction, equation 9.
    """
    if sample.log_probability is None or not sample.output_tokens:
        return None
    return min(1.0, float(np.exp(sample.log_probability / sample.output_tokens)))


def chosen_labels(log_probabilities: np.ndarray, asking: Asking, row: Row) -> list[int]:
    """Which labels a member answers to one row.

    Args:
        log_probabilities: Of the labels, in nats. [K]
        asking: How.
        row: Its name decides the draws.

    Returns:
        The most probable label, or k labels drawn from the probabilities at the temperature.
    """
    if asking.temperature == 0:
        return [int(np.argmax(log_probabilities))] * asking.samples
    scaled = log_probabilities.astype(np.float64) / asking.temperature
    weights = np.exp(scaled - scaled.max())
    shares = np.cumsum(weights) / weights.sum()
    draws = [numpy_generator(seed, "label").random() for seed in asking.seeds(row)]
    return [
        int(min(np.searchsorted(shares, draw, side="right"), shares.size - 1)) for draw in draws
    ]
