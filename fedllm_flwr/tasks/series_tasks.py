"""Numeric series with a class each, for reservoirs: levels to be routed to words, and a chaotic series to be forecast.

A row's text is its series as numbers with four decimals, steps separated by spaces, so partitions, baselines and
everything else that knows rows of text needs to know nothing of series. :func:`parse_series` reads it back.

Axes: T steps of a context, n_in values of a step.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from fedllm_flwr.errors import DataError
from fedllm_flwr.reservoir.series import (
    classes_of,
    level_contexts,
    mackey_glass,
    quantile_edges,
    windows,
)
from fedllm_flwr.seeding import derive_seed, numpy_generator
from fedllm_flwr.tasks.base import SPLITS, Row, Split, Task, TaskOptions, Template

LEVELS = (0.0, 0.25, 0.5)
LEVEL_WORDS = ("up", "down", "flat")
"""The word that each level is to be routed to; the pairing has no meaning."""
QUANTILE_WORDS = ("cold", "cool", "warm", "hot")
WINDOW_STEPS = 30
LEVEL_ROWS: dict[Split, int] = {"train": 240, "validation": 60, "test": 300}
WINDOW_ROWS: dict[Split, int] = {"train": 1200, "validation": 200, "test": 400}
TEMPLATES = (Template("next", "Series: {text}\nNext:"),)


def load_levels(options: TaskOptions, seed: int) -> Task:
    """Contexts of 16 steps around one of three levels, as many of each, and the level's word.

    Args:
        options: Row counts above ``LEVEL_ROWS`` are met with further rows; the first rows stay the same.
        seed: Decides the noise.

    Source:
        The routing experiment of the split protocol's reference implementation (esnfed): levels 0, 1/4 and 1/2 with
        noise N(0, 0.02), clipped to [0, 1]. Here with 300 test rows instead of 12.
    """

    def drawn(split: Split) -> Iterator[tuple[np.ndarray, int]]:
        random = numpy_generator(seed, "level_routing", split)
        while True:
            contexts, classes = level_contexts(LEVELS, 1, random)
            yield from zip(contexts, classes.tolist(), strict=True)

    rows = {split: _rows(split, drawn(split), LEVEL_ROWS, options, LEVEL_WORDS) for split in SPLITS}
    return _task(options, rows, LEVEL_WORDS)


def load_mackey_glass(options: TaskOptions, seed: int) -> Task:
    """Windows of 30 values of a chaotic series, and in which quarter of the training values the next one lies.

    Each split is a trajectory of its own, from other start values, so no window of one is in another.

    Args:
        options: Row counts above ``WINDOW_ROWS`` are met with further rows; the first rows stay the same.
        seed: Decides the start values.
    """
    edges, rows = _edges(options, seed), {}
    for split in SPLITS:
        contexts, following = _windows(options, seed, split)
        labelled = zip(contexts, classes_of(following, edges).tolist(), strict=True)
        rows[split] = _rows(split, labelled, WINDOW_ROWS, options, QUANTILE_WORDS)
    return _task(options, rows, QUANTILE_WORDS)


def last_value_classes(options: TaskOptions, seed: int, rows: Sequence[Row]) -> np.ndarray:
    """What says of windows of :func:`load_mackey_glass` that the next value is the last one (persistence).

    Args:
        options: Of the task.
        seed: Of the task.
        rows: Of it.

    Returns:
        The class of each row's last value, int64 [n].
    """
    last = np.array([parse_series(row, 1)[-1, 0] for row in rows], dtype=np.float64)
    return classes_of(last, _edges(options, seed))


def _windows(options: TaskOptions, seed: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
    length = max(WINDOW_ROWS[split], _asked(options)[split]) + WINDOW_STEPS
    own = mackey_glass(length, derive_seed(seed, "mackey_glass", split))
    return windows(own, WINDOW_STEPS)


def _edges(options: TaskOptions, seed: int) -> np.ndarray:
    """Bounds of the classes: quantiles of the usual training values."""
    _, following = _windows(options, seed, "train")
    return quantile_edges(following[: WINDOW_ROWS["train"]], len(QUANTILE_WORDS))


def parse_series(row: Row, width: int) -> np.ndarray:
    """The series of a row.

    Args:
        row: Its text has one number after the other, step by step.
        width: n_in, >= 1.

    Returns:
        float32 [T, n_in], T >= 1, finite.

    Raises:
        DataError: The text is no such series; names the row.
    """
    words = row.text.split()
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise DataError(f"row {row.row_id}: expected numbers, {error}") from None
    if not values or len(values) % width:
        raise DataError(
            f"row {row.row_id}: expected at least one step of {width} numbers, got {len(values)} numbers"
        )
    if not all(math.isfinite(value) for value in values):
        raise DataError(f"row {row.row_id}: expected finite numbers, got NaN or infinity")
    return np.array(values, dtype=np.float32).reshape(-1, width)


def _asked(options: TaskOptions) -> dict[Split, int]:
    return {
        "train": options.train_rows,
        "validation": options.validation_rows,
        "test": options.test_rows,
    }


def _rows(
    split: Split,
    drawn: Iterable[tuple[np.ndarray, int]],
    usual: dict[Split, int],
    options: TaskOptions,
    words: tuple[str, ...],
) -> tuple[Row, ...]:
    count = max(usual[split], _asked(options)[split])
    return tuple(
        Row(f"{split}-{number:05d}", _text(context), words[label], label)
        for number, (context, label) in enumerate(islice(drawn, count))
    )


def _text(context: np.ndarray) -> str:
    return " ".join(f"{value:.4f}" for value in context.ravel())


def _task(
    options: TaskOptions, splits: dict[Split, tuple[Row, ...]], words: tuple[str, ...]
) -> Task:
    return Task(
        name=options.name,
        kind="classification",
        splits=splits,
        label_names=words,
        label_words=words,
        templates=TEMPLATES,
        series_width=1,
    )
