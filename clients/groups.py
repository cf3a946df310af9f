"""Which group a row is in, and which cluster a client: facts of a client's own rows, of which only sums leave it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from clients.workspace import Workspace
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.attributes import groups_of, predict_attribute
from fedllm_flwr.training.evaluate import EvalSums

EVERYONE = "all"
"""The group of all rows where a run has no groups and still wants sums (q-FFL)."""
NO_GROUP = "none"
"""Of a row to which the data gives no group."""
RANDOM_GROUPS = 4


def trained_groups(work: Workspace, partition_id: int) -> list[str]:
    """The group of each training row, as the objective sees it."""
    return _names(work, partition_id, "train", work.config.fairness.groups)


def measured_groups(work: Workspace, partition_id: int, split: str) -> list[str] | None:
    """The group of each held-out row, for the figures; None where the run has no groups.

    The data's own groups wherever it has them, also if the objective sees inferred or random ones: a control that
    measures itself on its own groups would tell nothing.
    """
    chosen = work.config.fairness.groups
    if chosen == "none":
        return None
    rows = getattr(work.rows(partition_id), split)
    has_own = chosen in ("inferred", "random") and all(row.group is not None for row in rows)
    return _names(work, partition_id, split, "data" if has_own else chosen)


def cluster_of(work: Workspace, partition_id: int) -> str:
    """The group that most of a client's training rows are in; the first by name if several are as large.

    Raises:
        ConfigError: The data has no groups.
    """
    found = Counter(row.group for row in work.rows(partition_id).train if row.group is not None)
    if not found:
        raise ConfigError(
            f"method.cluster_length > 0 and task={work.task.name}: the rows of client {partition_id} have no group "
            "to be clustered by"
        )
    return min(found, key=lambda name: (-found[name], name))


def row_weights(groups: Sequence[str], weights: Mapping[str, float]) -> np.ndarray | None:
    """The weight of each row's loss [n], with a mean of 1; None where all weigh 1.

    How much a client's rows weigh together is not in its loss but in the server's mean (``Balance.factor``): an
    adaptive optimizer such as Adam takes steps of one size whatever the loss is multiplied with. For one step of plain
    gradient descent both are the same.
    """
    if not weights:
        return None
    found = np.array([weights.get(group, 1.0) for group in groups])
    return found / found.mean() if found.any() else np.ones(len(found))


def group_sums(
    groups: Sequence[str], losses: np.ndarray, tokens: np.ndarray, correct: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Sums over each group's rows, the loss of a row being the mean over its label tokens.

    Args:
        groups: Of each row.
        losses: Summed over each row's label tokens, in nats [n].
        tokens: Label tokens of each row [n].
        correct: 1 where the label is right, 0 where it is not, -1 where there is none [n].
    """
    means = losses / np.maximum(tokens, 1)
    names = np.array(groups)
    return {
        str(name): {
            "loss_sum": float(means[names == name].sum()),
            "correct": int((correct[names == name] == 1).sum()),
            "total": int((names == name).sum()),
        }
        for name in np.unique(names)
    }


def evaluation_sums(
    rows: Sequence[Encoded], losses: np.ndarray, tokens: np.ndarray, correct: np.ndarray
) -> dict[str, Any]:
    """What an evaluation sends of some rows (see :class:`fedllm_flwr.training.evaluate.EvalSums`)."""
    return asdict(
        EvalSums(
            correct=int((correct == 1).sum()),
            total=int((correct >= 0).sum()),
            loss_sum=float(losses.sum()),
            label_tokens=int(tokens.sum()),
            characters=sum(row.characters for row in rows),
        )
    )


def _names(work: Workspace, partition_id: int, split: str, kind: str) -> list[str]:
    rows = getattr(work.rows(partition_id), split)
    if kind == "none":
        return [EVERYONE] * len(rows)
    if kind == "client":
        return [str(partition_id)] * len(rows)
    if kind == "label":
        if work.task.kind != "classification":  # a target is then free text, which must not leave
            raise ConfigError(
                f"fairness.groups=label and task={work.task.name}: expected rows with labels, got free text"
            )
        return [row.target for row in rows]
    if kind == "random":
        return [_random_group(work.config.rows_seed, row) for row in rows]
    if kind == "inferred":
        return _inferred(work, partition_id, split)
    return [NO_GROUP if row.group is None else row.group for row in rows]


def _random_group(seed: int, row: Row) -> str:
    return f"random {numpy_generator(seed, 'group', row.row_id).integers(RANDOM_GROUPS)}"


@lru_cache(maxsize=4096)
def _inferred(work: Workspace, partition_id: int, split: str) -> list[str]:
    rows = getattr(work.rows(partition_id), split)
    question = work.task.attribute
    if question is None:
        raise ConfigError(
            f"fairness.groups=inferred and task={work.task.name}: it asks for no attribute"
        )
    predicted = predict_attribute(
        work.backbone, rows, question, max_tokens=work.config.task.max_tokens
    )
    return groups_of(rows, predicted)
