"""Which rows of a matrix are trained until the next refresh, and the projection P that they stand for.

Axes: m rows of a matrix G, of which r are drawn; k <= r rows are left when rows drawn twice are merged.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError

RowRule = Literal[
    "top_r",
    "norm_r",
    "norm_nr",
    "norm2_r",
    "norm2_nr",
    "uniform_r",
    "uniform_nr",
    "frozen_pass",
]
"""How rows are picked: the largest (``top_r``), or drawn with a probability in proportion to their norm (``norm``), its
square (``norm2``) or equal for all (``uniform``), each with (``_r``) or without (``_nr``) replacement. ``frozen_pass``
is ``top_r`` by the column norms of dL/dY, which are there before the weight gradient is multiplied out; it is our own
rule and another one than the paper's, since the norms of the inputs are left out."""

UNBIASED: frozenset[RowRule] = frozenset({"norm_r", "norm2_r", "uniform_r"})
"""The rules with E[P Pᵀ] = I."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The projection Pᵀ = diag(scales) B, where row j of B picks row ``indices[j]``.

    Attributes:
        indices: Distinct rows in rising order, int64 [k].
        scales: ρ of each, float32 [k], > 0.

    Raises:
        ShapeError: The arrays do not fit each other, or an index is negative or not above the one before it.
    """

    indices: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        if self.indices.ndim != 1 or self.indices.shape != self.scales.shape:
            found = f"{self.indices.shape} and {self.scales.shape}"
            raise ShapeError(f"rows: expected as many scales as indices, got {found}")
        if (np.diff(self.indices, prepend=-1) < 1).any():
            raise ShapeError(f"rows: expected rising indices >= 0, got {self.indices.tolist()}")


def choose_rows(
    norms_squared: np.ndarray, rank: int, rule: RowRule, generator: np.random.Generator
) -> Rows:
    """Pick rows.

    With q the probabilities of the rows, those drawn with replacement have ρ = 1 / √(r q), which makes E[P Pᵀ] = I.
    A row drawn c times is kept once with the scale √c ρ: P Pᵀ is the same, and the optimizer state has one row for
    it. All other rules have ρ = 1. Where all norms are 0, every row is as likely; where fewer than r rows can be
    drawn without replacement, rows of norm 0 fill up, each as likely.

    Args:
        norms_squared: Of the rows, [m], >= 0; only its length counts for the uniform rules.
        rank: r, from 1 to m.
        rule: How to pick.
        generator: Draws; ``top_r`` and ``frozen_pass`` do not use it and prefer the lower row of equals.

    Returns:
        k = r rows; with replacement 1 <= k <= r.

    Raises:
        ConfigError: The rank is out of range or the rule unknown.
        ShapeError: A norm is negative or not finite, or they are no vector.

    Source:
        Muhamed et al. 2024 (GRASS), section 3. Departure: the paper keeps a row drawn twice as two rows. Under SGD
        that is the same update; under Adam two equal rows move by 2 ρ Δ together, the merged one by √2 ρ Δ.
    """
    if rule not in get_args(RowRule):
        raise ConfigError(f"row rule: expected one of {', '.join(get_args(RowRule))}, got {rule!r}")
    if norms_squared.ndim != 1 or not (np.isfinite(norms_squared) & (norms_squared >= 0)).all():
        raise ShapeError(
            f"row norms: expected a vector of finite numbers >= 0, got {norms_squared}"
        )
    check_rank(rank, len(norms_squared), "matrix")
    if rule in ("top_r", "frozen_pass"):
        return _plain(np.argsort(-norms_squared, kind="stable")[:rank])
    likely = _probabilities(norms_squared, rule)
    if rule in UNBIASED:
        drawn = generator.choice(len(likely), rank, replace=True, p=likely)
        indices, counts = np.unique(drawn, return_counts=True)
        scales = np.sqrt(counts / (rank * likely[indices]))
        return Rows(indices, scales.astype(np.float32))
    possible = int((likely > 0).sum())
    indices = generator.choice(len(likely), min(rank, possible), replace=False, p=likely)
    if possible < rank:
        rest = generator.choice(np.flatnonzero(likely == 0), rank - possible, replace=False)
        indices = np.concatenate([indices, rest])
    return _plain(indices)


def check_rank(rank: int, rows: int, who: str) -> None:
    """Refuse a rank that a matrix does not have.

    Args:
        rank: Rows to pick.
        rows: Rows that there are.
        who: Of which matrix, for the message.

    Raises:
        ConfigError: The rank is below 1 or above the number of rows.
    """
    if not 1 <= rank <= rows:
        raise ConfigError(f"{who}: expected a rank from 1 to its {rows} rows, got {rank}")


def _probabilities(norms_squared: np.ndarray, rule: RowRule) -> np.ndarray:
    """Q [m], float64."""
    largest = norms_squared.max()
    if rule.startswith("uniform") or largest == 0:
        return np.full(len(norms_squared), 1.0 / len(norms_squared))
    shares = norms_squared.astype(np.float64) / largest
    weights = np.sqrt(shares) if rule.startswith("norm_") else shares
    return weights / weights.sum()


def _plain(indices: np.ndarray) -> Rows:
    ordered = np.sort(indices).astype(np.int64)
    return Rows(ordered, np.ones(len(ordered), dtype=np.float32))
