"""Look at single examples under an adapter: what attacks on a model need to know.

A row's tokens are its targets, as training saw them: under the loss ``labels`` one token among the labels, else the
answer's tokens among the whole vocabulary.

Axes: n rows, t target tokens of one row, V tokens that the softmax is over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from torch import Tensor

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation import Adaptation, Generator, Query, Sampling
from fedllm_flwr.models.generation_batch import next_logits
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import by_length
from fedllm_flwr.training.evaluate import BATCH_TOKENS, computing, target_states
from fedllm_flwr.unlearning.attacks import min_k_plus_plus, vocabulary_moments

CHUNK_POSITIONS = 32
"""Positions whose logits are held at a time: about 50 MB for 50,000 tokens, with what is made of them."""

PLAIN = Adaptation()
"""Nothing added to the frozen model."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What a model says of each row, in their order.

    Attributes:
        losses: Mean cross-entropy of a row's tokens, nats, float64. [n]
        token_losses: Of each row, float64 [t].
        min_k: Min-K%++ scores, higher for rows that look trained on. [n]
        exact: Whether each of a row's tokens is the most probable one: greedy decoding says them all. bool [n]
        correct: 1 where the row's label is the most probable one, 0 where it is not, -1 where there is no label or none
            are compared, int64 [n].
    """

    losses: np.ndarray
    token_losses: tuple[np.ndarray, ...]
    min_k: np.ndarray
    exact: np.ndarray
    correct: np.ndarray


def examine(
    backbone: Backbone,
    rows: Sequence[Encoded],
    adaptation: Adaptation = PLAIN,
    *,
    head_token_ids: tuple[int, ...] | None = None,
    label_token_ids: tuple[int, ...] | None = None,
    share: float = 0.2,
    batch_tokens: int = BATCH_TOKENS,
) -> Examination:
    """Score rows one by one; computed in batches.

    Args:
        backbone: The shared model.
        rows: Encoded rows.
        adaptation: What a run has added to the model.
        head_token_ids: As in training: the tokens that the loss is restricted to.
        label_token_ids: The tokens to choose a label among; default ``head_token_ids``.
        share: K of Min-K%++, the share of a row's tokens that counts.
        batch_tokens: Padded positions of one batch.

    Raises:
        ConfigError: The share is out of range.
        ShapeError: The adapter has another size, or a row does not suit the place of the prompt.
    """
    labels = head_token_ids if label_token_ids is None else label_token_ids
    losses: list[np.ndarray] = [np.zeros(0)] * len(rows)
    min_k, exact = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    correct = np.full(len(rows), -1)
    added = adaptation
    with computing(backbone, rows, added.adapter, added.spec, added.delta, added.fixed_ids) as (
        hidden,
        extra,
    ):
        for members in by_length(rows, batch_tokens, extra):
            batch = [rows[i] for i in members]
            states, targets = target_states(backbone, hidden, batch)
            table = _tokens(backbone, states, targets, head_token_ids, labels)
            ends = np.cumsum([len(row.targets) for row in batch])
            for i, tokens in zip(members, np.split(table, ends[:-1], axis=1), strict=True):
                logs, means, deviations, best, choice = tokens
                losses[i] = -logs
                min_k[i] = min_k_plus_plus(logs, means, deviations, share)
                exact[i] = (best == rows[i].targets).all()
                if labels is not None and rows[i].label >= 0:
                    correct[i] = int(choice[0]) == rows[i].label
    return Examination(
        np.array([each.mean() for each in losses]), tuple(losses), min_k, exact, correct
    )


def answers(
    backbone: Backbone,
    rows: Sequence[Encoded],
    adaptation: Adaptation = PLAIN,
    *,
    sampling: Sampling,
) -> list[tuple[str, ...]]:
    """What a model answers to the rows' prompts.

    Args:
        backbone: The shared model.
        rows: Encoded rows; their targets are not read.
        adaptation: What a run has added to the model.
        sampling: How: by default greedily; several seeds give several answers.

    Returns:
        Of each row, an answer for each seed.

    Raises:
        ConfigError: A prompt cannot be answered; see :meth:`fedllm_flwr.models.generation.Generator.check`.
    """
    queries = [Query(prompt_of(row), sampling) for row in rows]
    found = Generator(backbone, adaptation).generate(queries)
    return [tuple(sample.text for sample in own.samples) for own in found]


def prompt_of(row: Encoded) -> tuple[int, ...]:
    """Token ids of what a row asks, without its answer."""
    return tuple(row.input_ids[: int(row.predict_from[0]) + 1].tolist())


def _tokens(
    backbone: Backbone,
    states: Tensor,
    targets: Tensor,
    head_token_ids: tuple[int, ...] | None,
    label_token_ids: tuple[int, ...] | None,
) -> np.ndarray:
    """Log-probability, mean and deviation over the softmax, best token, and best label of each target, [5, targets]."""
    parts = [np.zeros((5, 0))]
    for start in range(0, len(states), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        full = next_logits(backbone, states[chunk]).cpu().numpy()
        logits = full if head_token_ids is None else full[:, list(head_token_ids)]
        right = np.take_along_axis(logits, targets[chunk].cpu().numpy()[:, None], axis=1)[:, 0]
        logs = right.astype(np.float64) - logsumexp(logits.astype(np.float64), axis=1)
        choice = np.full(len(full), -1)
        if label_token_ids is not None:
            choice = full[:, list(label_token_ids)].argmax(1)
        parts.append(np.stack([logs, *vocabulary_moments(logits), logits.argmax(1), choice]))
    return np.concatenate(parts, axis=1)
