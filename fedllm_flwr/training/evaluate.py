"""Measure an adapter on rows, without gradient.

Axes: n rows, K label tokens, t tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cohort import delta_active
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, by_length, collate
from fedllm_flwr.training.prompt_stacks import check_rows, extra_positions, reused_tokens
from fedllm_flwr.training.stacks import AdapterSpec, make_stack, plain_hidden

Hidden = Callable[[Tensor, Sequence[int]], Tensor]
BATCH_TOKENS = 1024
"""Padded positions of a batch: enough rows for matrix products to run at full speed, and no more memory."""


@dataclass(frozen=True)
class EvalSums:
    """Sums over rows, so that parts of a data set, and clients, can be added.

    Attributes:
        correct: Rows whose label is the most probable one.
        total: Rows with a label that were scored.
        loss_sum: Cross-entropy of all label tokens, in nats.
        label_tokens: Targets.
        characters: Characters that the targets stand for.
    """

    correct: int = 0
    total: int = 0
    loss_sum: float = 0.0
    label_tokens: int = 0
    characters: int = 0

    def __add__(self, other: "EvalSums") -> "EvalSums":
        """Sums over the rows of both."""
        return EvalSums(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def evaluate(
    backbone: Backbone,
    rows: Sequence[Encoded],
    *,
    head_token_ids: tuple[int, ...] | None = None,
    label_token_ids: tuple[int, ...] | None = None,
    adapter: np.ndarray | None = None,
    spec: AdapterSpec | None = None,
    delta: Delta | None = None,
    fixed_ids: tuple[int, ...] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> EvalSums:
    """Loss over all targets, and accuracy over the rows that have a label.

    A row's prediction is the most probable of the label tokens where its first target is predicted.

    Args:
        backbone: The shared model.
        rows: Encoded rows; none give zero sums.
        head_token_ids: As in training: the tokens that the loss is restricted to.
        label_token_ids: The tokens to choose among, in label order. Default ``head_token_ids``; if
            both are None no accuracy is measured.
        adapter: Flat adapter, as in :class:`fedllm_flwr.training.local.ClientJob`; None for the plain model.
        spec: Settings of the adapter.
        delta: A frozen update under the adapter.
        fixed_ids: The text that all rows begin with; only a prompt behind it makes use of it.
        batch_tokens: Padded positions of one batch.

    Raises:
        ConfigError: An adapter without its specification.
        ShapeError: The adapter has another size, or a row does not suit the place of the prompt.
    """
    losses, tokens, correct = row_scores(
        backbone,
        rows,
        head_token_ids=head_token_ids,
        label_token_ids=label_token_ids,
        adapter=adapter,
        spec=spec,
        delta=delta,
        fixed_ids=fixed_ids,
        batch_tokens=batch_tokens,
    )
    return EvalSums(
        correct=int((correct == 1).sum()),
        total=int((correct >= 0).sum()),
        loss_sum=float(losses.sum()),
        label_tokens=int(tokens.sum()),
        characters=sum(row.characters for row in rows),
    )


def row_scores(
    backbone: Backbone,
    rows: Sequence[Encoded],
    *,
    head_token_ids: tuple[int, ...] | None = None,
    label_token_ids: tuple[int, ...] | None = None,
    adapter: np.ndarray | None = None,
    spec: AdapterSpec | None = None,
    delta: Delta | None = None,
    fixed_ids: tuple[int, ...] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What :func:`evaluate` sums, row by row.

    Args:
        backbone: The shared model.
        rows: Encoded rows.
        head_token_ids: As in :func:`evaluate`.
        label_token_ids: As in :func:`evaluate`.
        adapter: As in :func:`evaluate`.
        spec: As in :func:`evaluate`.
        delta: As in :func:`evaluate`.
        fixed_ids: As in :func:`evaluate`.
        batch_tokens: As in :func:`evaluate`.

    Returns:
        In the order of the rows: cross-entropy of all targets in nats, float64 [n]; targets, int64 [n]; and 1 if
        the row's label is the most probable one, 0 if it is not, -1 if there is no label or none are compared,
        int64 [n].

    Raises:
        ConfigError: An adapter without its specification.
        ShapeError: The adapter has another size, or a row does not suit the place of the prompt.
    """
    choices = head_token_ids if label_token_ids is None else label_token_ids
    losses = np.zeros(len(rows))
    correct = np.full(len(rows), -1)
    with computing(backbone, rows, adapter, spec, delta, fixed_ids) as (hidden, extra):
        for members in by_length(rows, batch_tokens, extra):
            batch = [rows[i] for i in members]
            losses[members], correct[members] = _batch_scores(
                backbone, hidden, batch, head_token_ids, choices
            )
    return losses, np.array([len(row.targets) for row in rows], dtype=np.int64), correct


def scores(
    backbone: Backbone,
    rows: Sequence[Encoded],
    *,
    label_token_ids: tuple[int, ...],
    adapter: np.ndarray | None = None,
    spec: AdapterSpec | None = None,
    delta: Delta | None = None,
    fixed_ids: tuple[int, ...] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Log-probability of each label where a row's first target is predicted.

    Args:
        backbone: The shared model.
        rows: Encoded rows.
        label_token_ids: The tokens that the softmax is restricted to, in label order.
        adapter: As in :func:`evaluate`.
        spec: As in :func:`evaluate`.
        delta: As in :func:`evaluate`.
        fixed_ids: As in :func:`evaluate`.
        batch_tokens: As in :func:`evaluate`.

    Returns:
        float32 [n, K] in nats, in the order of the rows.

    Raises:
        ConfigError: An adapter without its specification.
        ShapeError: The adapter has another size, or a row does not suit the place of the prompt.
    """
    found = np.zeros((len(rows), len(label_token_ids)), dtype=np.float32)
    with computing(backbone, rows, adapter, spec, delta, fixed_ids) as (hidden, extra):
        for members in by_length(rows, batch_tokens, extra):
            batch = [rows[i] for i in members]
            states, _ = target_states(backbone, hidden, batch)
            states = states[_first(batch, states.device)]
            found[members] = _label_log_probabilities(backbone, states, label_token_ids)
    return found


@contextmanager
def computing(
    backbone: Backbone,
    rows: Sequence[Encoded],
    adapter: np.ndarray | None,
    spec: AdapterSpec | None,
    delta: Delta | None,
    fixed_ids: tuple[int, ...],
) -> Iterator[tuple[Hidden, int]]:
    """Final hidden states with an adapter and a delta, if there are any, without gradient.

    The arguments are those of :func:`evaluate`, and so are the errors.

    Yields:
        What computes final hidden states [b, t, d] of token ids [b, t], and the positions that each row takes beside
        one for each of its tokens.

    Raises:
        ConfigError: An adapter without its specification.
        ShapeError: The adapter has another size, or a row does not suit the place of the prompt.
    """
    plain = not delta
    with torch.no_grad(), delta_active(backbone, delta or {}):
        if adapter is None:
            yield plain_hidden(backbone, plain_layers=plain), 0
            return
        if spec is None:
            raise ConfigError("evaluation: expected the specification of the adapter, got none")
        check_rows(spec, rows, fixed_ids)
        dry = replace(spec, dropout=0.0) if isinstance(spec, LoraSpec) else spec
        stack = make_stack(backbone, dry, 1, "both", plain_layers=plain, fixed_ids=fixed_ids)
        stack.load(0, adapter)
        reused = reused_tokens(backbone, [spec], fixed_ids, plain_layers=plain)
        with stack.active():
            stack.bind([0], [0])
            yield stack.hidden, extra_positions(spec, reused)


def target_states(
    backbone: Backbone, hidden: Hidden, rows: Sequence[Encoded]
) -> tuple[Tensor, Tensor]:
    """Hidden states [n, d] that predict the rows' targets, row after row, and those targets [n].

    Args:
        backbone: The shared model.
        hidden: As :func:`computing` gives it.
        rows: One batch.
    """
    batch = collate([Share(rows)], backbone.device)
    states = hidden(batch.input_ids, batch.lengths).flatten(0, 1)
    return states.index_select(0, batch.positions), batch.targets


def _first(rows: Sequence[Encoded], device: torch.device) -> Tensor:
    """Where each row's first target lies among the targets of all rows."""
    ends = np.cumsum([len(row.targets) for row in rows])
    starts = ends - [len(row.targets) for row in rows]
    return torch.from_numpy(starts).to(device)


def _batch_scores(
    backbone: Backbone,
    hidden: Hidden,
    rows: Sequence[Encoded],
    head_token_ids: tuple[int, ...] | None,
    label_token_ids: tuple[int, ...] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and correctness of each row, as in :func:`row_scores`."""
    states, targets = target_states(backbone, hidden, rows)
    losses, best = backbone.row_scores(states, targets, head_token_ids)
    sums = np.zeros(len(rows))
    owners = np.repeat(np.arange(len(rows)), [len(row.targets) for row in rows])
    np.add.at(sums, owners, losses.double().cpu().numpy())
    if label_token_ids is None:
        return sums, np.full(len(rows), -1)
    first = _first(rows, states.device)
    if label_token_ids == head_token_ids:
        best = best[first]
    else:
        _, best = backbone.row_scores(states[first], torch.zeros_like(first), label_token_ids)
    labels = np.array([row.label for row in rows])
    return sums, np.where(labels < 0, -1, best.cpu().numpy() == labels)


def _label_log_probabilities(
    backbone: Backbone, states: Tensor, label_token_ids: tuple[int, ...]
) -> np.ndarray:
    """[n, K], by asking for the loss of every label in turn."""
    choices = len(label_token_ids)
    repeated = states.repeat_interleave(choices, dim=0)
    targets = torch.arange(choices, device=states.device).repeat(len(states))
    losses, _ = backbone.row_scores(repeated, targets, label_token_ids)
    return -losses.view(-1, choices).cpu().numpy()
