"""Rows of matrices in a checkpoint: which they are, and their values, each as one array over all matrices.

Axes: m rows and n columns of a matrix, k rows of it that are kept.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.grass.packing import pack, unpack
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import Rows
from strategies.observer import Checkpointed

CHANGED, CHOSEN = "changed", "chosen"


def saved_arrays(
    changed: Mapping[str, RowUpdate], chosen: Mapping[str, Rows]
) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint.

    Args:
        changed: Rows that differ from the backbone, by layer.
        chosen: Rows in training, by layer.
    """
    return {
        f"{CHANGED}/rows": _joined([changed[n].indices for n in sorted(changed)], np.int64),
        f"{CHANGED}/values": pack(changed),
        f"{CHOSEN}/rows": _joined([chosen[n].indices for n in sorted(chosen)], np.int64),
        f"{CHOSEN}/scales": _joined([chosen[n].scales for n in sorted(chosen)], np.float32),
    }


def saved_counts(changed: Mapping[str, RowUpdate], chosen: Mapping[str, Rows]) -> dict[str, Any]:
    """How many rows of each layer the arrays hold, for a checkpoint's state."""
    return {
        CHANGED: {name: len(update.indices) for name, update in sorted(changed.items())},
        CHOSEN: {name: len(rows.indices) for name, rows in sorted(chosen.items())},
    }


def restored(
    saved: Checkpointed, shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, RowUpdate], dict[str, Rows]]:
    """Undo both.

    Args:
        saved: The checkpoint.
        shapes: m and n of the run's matrices.

    Raises:
        ShapeError: The checkpoint holds rows that these matrices do not have.
    """
    who = f"checkpoint of round {saved.server_round}"
    unknown = sorted((set(saved.state[CHANGED]) | set(saved.state[CHOSEN])) - set(shapes))
    if unknown:
        raise ShapeError(f"{who}: expected rows of the run's layers, got layer {unknown[0]}")
    indices = _parted(saved.arrays[f"{CHANGED}/rows"], saved.state[CHANGED], who)
    columns = {name: n for name, (_, n) in shapes.items()}
    changed = unpack(saved.arrays[f"{CHANGED}/values"], indices, columns)
    for name, update in changed.items():
        update.check(shapes[name], f"{who}, layer {name}")
    rows = _parted(saved.arrays[f"{CHOSEN}/rows"], saved.state[CHOSEN], who)
    scales = _parted(saved.arrays[f"{CHOSEN}/scales"], saved.state[CHOSEN], who)
    chosen = {name: Rows(rows[name], scales[name]) for name in rows}
    for name, found in chosen.items():
        if (found.indices >= shapes[name][0]).any():
            raise ShapeError(
                f"{who}, layer {name}: expected rows below {shapes[name][0]}, got {found.indices[-1]}"
            )
    return changed, chosen


def _joined(pieces: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([*pieces, np.zeros(0, dtype)]).astype(dtype)


def _parted(flat: np.ndarray, counts: Mapping[str, int], who: str) -> dict[str, np.ndarray]:
    if len(flat) != sum(counts.values()):
        raise ShapeError(f"{who}: expected {sum(counts.values())} rows, got {len(flat)}")
    found, start = {}, 0
    for name in sorted(counts):
        found[name] = flat[start : start + counts[name]]
        start += counts[name]
    return found
