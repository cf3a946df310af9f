"""Seeded choices of rows that keep the mixture of labels, whatever order the rows come in.

Every choice ranks rows by a hash of ``(seed, purpose, row id)``, so it depends on neither the process nor
the other rows' order, and adding rows to a file moves few of the old ones.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from fedllm_flwr.tasks.base import Row

T = TypeVar("T")


def hash_rank(seed: int, purpose: str, key: str) -> int:
    """A number that looks random, in [0, 2**64), the same for the same three arguments everywhere."""
    digest = hashlib.blake2b(f"{seed}\x1f{purpose}\x1f{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def shuffled(rows: Sequence[Row], seed: int, purpose: str) -> list[Row]:
    """The rows in the order of their hashes."""
    return sorted(rows, key=lambda row: (hash_rank(seed, purpose, row.row_id), row.row_id))


def label_stratum(row: Row) -> tuple[str, ...]:
    """Rows of one label, group and natural client, as far as they have them."""
    return (str(row.label), row.group or "", row.client or "")


def spread(
    units: Sequence[T], count: int, stratum: Callable[[T], object], rank: Callable[[T], object]
) -> list[T]:
    """Choose exactly ``count`` units, each stratum giving its share to within one unit.

    Systematic sampling: the units are sorted by stratum and then by rank, and every (n / count)-th is
    taken. Ranks must be distinct and random for the choice to be random within a stratum.

    Args:
        units: What to choose from.
        count: How many, 0 to ``len(units)``.
        stratum: The sortable stratum of a unit.
        rank: The sortable rank of a unit within its stratum.

    Returns:
        The chosen units, sorted by stratum and rank.

    Source:
        Cochran 1977, Sampling Techniques, ch. 8 (systematic sampling from an ordered list).
    """
    ordered = sorted(units, key=lambda unit: (stratum(unit), rank(unit)))
    marks = [index * count // len(ordered) for index in range(len(ordered) + 1)] if ordered else []
    return [unit for unit, (low, high) in zip(ordered, pairwise(marks), strict=True) if high > low]


def subsample(rows: tuple[Row, ...], count: int, seed: int, purpose: str) -> tuple[Row, ...]:
    """A sample balanced by label, group and natural client, in the rows' own order.

    Args:
        rows: What to choose from.
        count: How many; 0 keeps all, -1 keeps none, and more than there are keeps all.
        seed: The experiment's seed.
        purpose: Distinguishes samples drawn with one seed.

    Returns:
        The kept rows, in their first order.
    """
    if count < 0:
        return ()
    if count == 0 or count >= len(rows):
        return rows
    chosen = spread(
        rows, count, label_stratum, lambda row: (hash_rank(seed, purpose, row.row_id), row.row_id)
    )
    kept = {row.row_id for row in chosen}
    return tuple(row for row in rows if row.row_id in kept)


def hold_out(
    rows: Sequence[Row],
    fraction: float,
    seed: int,
    purpose: str,
    *,
    unit: Callable[[Row], str] = lambda row: row.row_id,
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Divide rows into a kept and a held-out part without dividing any unit.

    Args:
        rows: What to divide.
        fraction: Share of the units that is held out, in (0, 1); of two or more units, at least one
            is held out and at least one is kept.
        seed: The experiment's seed.
        purpose: Distinguishes divisions made with one seed.
        unit: Rows with the same unit (sentences of one document, copies of one text) stay together;
            a unit has the stratum of its first row.

    Returns:
        The kept and the held-out rows, both in their first order.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(unit(row), row)
    count = max(0, min(max(1, round(fraction * len(first))), len(first) - 1))
    held = spread(
        list(first),
        count,
        lambda key: label_stratum(first[key]),
        lambda key: (hash_rank(seed, purpose, key), key),
    )
    held_units = set(held)
    kept = tuple(row for row in rows if unit(row) not in held_units)
    return kept, tuple(row for row in rows if unit(row) in held_units)
