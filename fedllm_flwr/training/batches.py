"""Which rows train together, and how rows of several clients become one padded batch.

Everything is a pure function of the rows, the settings and a seed. Rows are padded on the right, so
under causal attention no token ever sees padding and no mask is needed.

Axes: K clients of a pass, b rows of one client in it, t padded length, n label tokens of the pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.settings import LocalSettings

PADDING_ID = 0
"""Any valid token id serves: nothing reads the states of padding."""
MAX_PADDING = 0.25
"""Share of a pass's positions that may be padding because its clients differ. A batched pass saves
less than this at the sizes where it saves least."""


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One client's part of a pass.

    Attributes:
        rows: Its rows, at least one.
        token_weight: Weight of each of its label tokens in the loss.
        row_weights: Further weight of each row's label tokens, one per row; None = 1.
    """

    rows: Sequence[Encoded]
    token_weight: float = 1.0
    row_weights: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Input tokens, padding not counted."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def token_weights(self) -> np.ndarray:
        """Weight of each label token, row after row, float32."""
        weights = np.ones(len(self.rows)) if self.row_weights is None else self.row_weights
        counts = [len(row.targets) for row in self.rows]
        return np.repeat(self.token_weight * weights, counts).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One pass in tensors.

    Attributes:
        input_ids: [K * b, t]; the rows of a client lie together, and every client has b of them, the
            missing ones being padding only.
        positions: Where the label tokens are predicted, in the flattened [K * b * t]. [n]
        targets: What should be predicted there. [n]
        weights: Weight of each label token, float32. [n]
        owners: Index of the share that each label token belongs to. [n]
        lengths: Tokens of each row, padding not counted; K * b numbers.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    owners: Tensor
    lengths: tuple[int, ...]


def label_tokens(rows: Iterable[Encoded]) -> int:
    """Targets of the rows."""
    return sum(len(row.targets) for row in rows)


def plan_steps(num_rows: int, settings: LocalSettings, seed: int) -> Iterator[list[np.ndarray]]:
    """The optimizer steps of one client in one round.

    Each epoch visits all rows once in an order drawn at the address (seed, "epoch", epoch). A step
    never spans two epochs, so the last one of an epoch may be smaller.

    Args:
        num_rows: The client's rows, >= 1.
        settings: Rows of a micro-batch and a step; how many epochs or steps.
        seed: The client's seed of this round.

    Yields:
        Per step its micro-batches, each the row indices it holds.
    """
    done = epoch = 0
    while done < settings.local_steps or (
        not settings.local_steps and epoch < settings.local_epochs
    ):
        order = numpy_generator(seed, "epoch", epoch).permutation(num_rows)
        for start in range(0, num_rows, settings.rows_per_step):
            if settings.local_steps and done == settings.local_steps:
                return
            step = order[start : start + settings.rows_per_step]
            yield [
                step[first : first + settings.batch_size]
                for first in range(0, len(step), settings.batch_size)
            ]
            done += 1
        epoch += 1


def split_passes(shares: Sequence[Share], extra: int = 0) -> list[list[int]]:
    """Divide shares into passes so that no pass is mostly padding.

    Shares are taken by falling size; one joins the current pass unless the padding of the whole
    would exceed ``MAX_PADDING`` of its positions.

    Args:
        shares: What the clients of a cohort want to compute next.
        extra: Positions that a row takes beside one for each of its tokens: a soft prompt's, less those of a
            text that is not computed again.

    Returns:
        Indices of the shares of each pass; every share is in exactly one.
    """
    by_size = sorted(range(len(shares)), key=lambda i: (-shares[i].length, -len(shares[i].rows), i))
    passes: list[list[int]] = []
    rows = length = area = 0
    for index in by_size:
        share = shares[index]
        own = (share.length + extra) * len(share.rows)
        if passes:
            most = max(rows, len(share.rows))
            positions = (len(passes[-1]) + 1) * most * length
            if area + own >= (1 - MAX_PADDING) * positions:
                passes[-1].append(index)
                rows, area = most, area + own
                continue
        passes.append([index])
        rows, length, area = len(share.rows), share.length + extra, own
    return [sorted(members) for members in passes]


def collate(shares: Sequence[Share], device: torch.device) -> Batch:
    """Put shares into one padded batch.

    Args:
        shares: The clients' rows in the order in which their adapters are bound.
        device: Where the tensors go.
    """
    most = max(len(share.rows) for share in shares)
    length = max(share.length for share in shares)
    ids = np.full((len(shares) * most, length), PADDING_ID, dtype=np.int64)
    lengths = [0] * len(ids)
    positions, targets, weights, owners = [], [], [], []
    for owner, share in enumerate(shares):
        weights.append(share.token_weights)
        for line, row in enumerate(share.rows, start=owner * most):
            lengths[line] = len(row.input_ids)
            ids[line, : lengths[line]] = row.input_ids
            positions.append(line * length + row.predict_from.astype(np.int64))
            targets.append(row.targets.astype(np.int64))
            owners.append(np.full(len(row.targets), owner, dtype=np.int64))
    parts = (np.concatenate(part) for part in (positions, targets, weights, owners))
    whole = [torch.from_numpy(array).to(device) for array in (ids, *parts)]
    return Batch(whole[0], whole[1], whole[2], whole[3], whole[4], tuple(lengths))


def by_length(rows: Sequence[Encoded], batch_tokens: int, extra: int = 0) -> Iterator[list[int]]:
    """Divide rows into batches of similar length, for evaluation.

    Args:
        rows: Rows in any order.
        batch_tokens: Padded positions of one batch; a longer row makes a batch of its own.
        extra: As in :func:`split_passes`.

    Yields:
        Indices of the rows of a batch, shortest rows first.
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i)):
        if batch and (len(batch) + 1) * (len(rows[index].input_ids) + extra) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
