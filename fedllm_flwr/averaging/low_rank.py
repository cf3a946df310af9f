"""Algebra of updates that are held as products of two thin matrices.

Axes: R = rank of the product (may be 0), i = input features, o = output features, r = rank wanted.
Arrays are float32; products and decompositions run in float64 and are rounded once at the end.
"""

import numpy as np

from fedllm_flwr.averaging.lora import LoraFactors, LowRank
from fedllm_flwr.errors import ShapeError

# A direction whose singular value is below this part of the largest one cannot be told from float32 rounding.
NOISE = float(np.finfo(np.float32).eps)


def product_of(factors: LoraFactors) -> LowRank:
    """The update that LoRA factors stand for, with the scaling folded into the left side."""
    left = np.multiply(factors.lora_b, factors.scaling, dtype=np.float64).astype(np.float32)
    return LowRank(left, factors.lora_a.astype(np.float32))


def dense(low_rank: LowRank) -> np.ndarray:
    """The product itself, [o, i] float32, summed in float64."""
    return (low_rank.left.astype(np.float64) @ low_rank.right.astype(np.float64)).astype(np.float32)


def negate(low_rank: LowRank) -> LowRank:
    """The update that takes this one back."""
    return LowRank(-low_rank.left, low_rank.right)


def add_low_rank(*terms: LowRank) -> LowRank:
    """Sum of updates of one layer, exactly, by putting their factors side by side.

    Args:
        terms: One or more updates of one shape (o, i); ranks may differ.

    Returns:
        Their sum, whose R is the sum of theirs. `compact` bounds it.

    Raises:
        ShapeError: The shapes differ; names the term by position.
        ValueError: There are no terms.
    """
    if not terms:
        raise ValueError("sum of updates: expected at least one term, got none")
    for position, term in enumerate(terms):
        if term.shape != terms[0].shape:
            raise ShapeError(f"term {position}: expected shape {terms[0].shape}, got {term.shape}")
    return LowRank(
        np.concatenate([term.left for term in terms], axis=1),
        np.concatenate([term.right for term in terms], axis=0),
    )


def as_low_rank(matrix: np.ndarray) -> LowRank:
    """Hold a dense update [o, i] exactly, as itself times the smaller identity (R = min(o, i))."""
    values = matrix.astype(np.float32)
    out_features, in_features = values.shape
    if out_features >= in_features:
        return LowRank(values, np.eye(in_features, dtype=np.float32))
    return LowRank(np.eye(out_features, dtype=np.float32), values)


def compact(low_rank: LowRank) -> LowRank:
    """Rewrite an update whose R is above min(o, i) as its dense product times an identity.

    Nothing is cut off; the product is only rounded to float32. Other updates come back as they are.
    """
    if low_rank.rank <= min(low_rank.shape):
        return low_rank
    return as_low_rank(dense(low_rank))


def best_rank(low_rank: LowRank, rank: int, scaling: float) -> LoraFactors:
    """The factors of rank r whose scaled product is nearest to an update in the Frobenius norm.

    QR of both sides leaves a core of R × R at most, whose SVD is that of the whole, so nothing of size o × i is formed
    while R is small. Each side gets the square root of a singular value, so that neither learns faster than the
    other; signs are fixed by making the entry of largest magnitude in each left vector positive.

    Args:
        low_rank: The update, exact.
        rank: Rank r of the factors wanted, > 0.
        scaling: Scaling s of the factors wanted, > 0; s · B A approximates the update.

    Returns:
        Float32 factors [r, i], [o, r]. Where the update has fewer than r directions above float32 rounding, the
        last ranks are zero on both sides; such a rank gets no gradient until the caller gives it a new row of A.

    Raises:
        ValueError: The rank or the scaling is not positive.

    Source:
        Eckart and Young 1936; as a federated rule Bai et al. 2024 (FlexLoRA, arXiv 2402.11505). Differs in the
        symmetric split of the singular values and in that the dense matrix is not formed.
    """
    if not (rank > 0 and scaling > 0):
        raise ValueError(f"expected rank > 0 and scaling > 0, got {rank} and {scaling}")
    left_basis, left_core = np.linalg.qr(low_rank.left.astype(np.float64))
    right_basis, right_core = np.linalg.qr(low_rank.right.astype(np.float64).T)
    u, singular, vt = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    kept = min(rank, int(np.sum(singular > NOISE * singular.max(initial=0.0))))
    columns = left_basis @ u[:, :kept]
    rows = vt[:kept] @ right_basis.T
    signs = _signs(columns)
    half = np.sqrt(singular[:kept] / scaling)
    out_features, in_features = low_rank.shape
    lora_a = np.zeros((rank, in_features), np.float32)
    lora_b = np.zeros((out_features, rank), np.float32)
    lora_a[:kept] = (signs * half)[:, None] * rows
    lora_b[:, :kept] = columns * (signs * half)
    return LoraFactors(lora_a, lora_b, scaling)


def _signs(columns: np.ndarray) -> np.ndarray:
    """Sign of the entry of largest magnitude in each column; the first one where two are equal."""
    largest = np.argmax(np.abs(columns), axis=0)
    return np.where(columns[largest, np.arange(columns.shape[1])] < 0, -1.0, 1.0)
