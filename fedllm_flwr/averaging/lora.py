"""LoRA factors, the updates they stand for, and how factors are brought to another rank or scaling.

Axes: r = rank, R = inner width of an update (may be 0), i = input features, o = output features.
Arrays are float32 unless said otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm_flwr.errors import ShapeError

Side = Literal["a", "b"]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """Two factors whose scaled product updates one linear layer: ΔW = scaling · B A.

    Attributes:
        lora_a: A, [r, i].
        lora_b: B, [o, r].
        scaling: alpha / r, or alpha / √r for rsLoRA; > 0.

    Raises:
        ShapeError: The arrays are not two matrices of one rank. A rank-1 factor is never stretched to match.
        ValueError: The scaling is not a positive finite number.

    Source:
        Hu et al. 2021, Eq. 3; Kalajdzievski 2023 (rsLoRA) for alpha / √r.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    scaling: float

    def __post_init__(self) -> None:
        a, b = self.lora_a.shape, self.lora_b.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ShapeError(
                f"LoRA factors: expected lora_a [r, i] and lora_b [o, r], got {a} and {b}"
            )
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise ValueError(f"scaling: expected a finite number > 0, got {self.scaling}")

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return int(self.lora_a.shape[0])

    @property
    def in_features(self) -> int:
        """Width i of the layer's input."""
        return int(self.lora_a.shape[1])

    @property
    def out_features(self) -> int:
        """Width o of the layer's output."""
        return int(self.lora_b.shape[0])


Adapter = Mapping[str, LoraFactors]
"""The factors of every adapted layer, by layer name."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update ΔW = left · right of one linear layer; every scaling is already inside.

    Attributes:
        left: [o, R].
        right: [R, i].

    Raises:
        ShapeError: The arrays are not two matrices that can be multiplied.
    """

    left: np.ndarray
    right: np.ndarray

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise ShapeError(
                f"low rank: expected left [o, R] and right [R, i], got {left} and {right}"
            )

    @property
    def rank(self) -> int:
        """Inner width R, at least the rank of the product."""
        return int(self.left.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of the product."""
        return int(self.left.shape[0]), int(self.right.shape[1])


Delta = Mapping[str, LowRank]
"""The update of every adapted layer, by layer name."""


def resize(factors: LoraFactors, rank: int) -> LoraFactors:
    """Bring factors to another rank by cutting the last ranks off or padding with zeros.

    Padding keeps the product. Cutting keeps the first ranks in their own coordinates, which is what a client of
    smaller rank trains on; it is not the best approximation (`low_rank.best_rank` is). A rank whose row of A *and*
    column of B are zero gets no gradient, so padded factors are for sums, not for a client to train.

    Args:
        factors: Factors of any rank.
        rank: The rank wanted, > 0.

    Returns:
        Factors of that rank and the same scaling.

    Raises:
        ValueError: The rank is not positive.

    Source:
        Cho et al. 2024 (HetLoRA, arXiv 2401.06432): its zero-padding and truncation, without its rank self-pruning.
    """
    if rank <= 0:
        raise ValueError(f"rank: expected > 0, got {rank}")
    if rank == factors.rank:
        return factors
    if rank < factors.rank:
        return LoraFactors(
            np.ascontiguousarray(factors.lora_a[:rank]),
            np.ascontiguousarray(factors.lora_b[:, :rank]),
            factors.scaling,
        )
    extra = rank - factors.rank
    return LoraFactors(
        np.pad(factors.lora_a, ((0, extra), (0, 0))),
        np.pad(factors.lora_b, ((0, 0), (0, extra))),
        factors.scaling,
    )


def rescale(factors: LoraFactors, scaling: float) -> LoraFactors:
    """Express the same update with another scaling, by folding the ratio of the two into B.

    Args:
        factors: Factors of any scaling s.
        scaling: The scaling wanted, > 0.

    Returns:
        Factors with A unchanged, B · s / scaling as float32, and the scaling wanted.

    Raises:
        ValueError: The scaling is not a positive finite number.
    """
    if scaling == factors.scaling:
        return factors
    return LoraFactors(factors.lora_a, _times(factors.lora_b, factors.scaling, scaling), scaling)


def beside_shared(
    trained: np.ndarray, shared: LoraFactors, *, side: Side, scaling: float
) -> LoraFactors:
    """Put the one factor that a client trained beside the other factor, which the whole cohort shares.

    When clients train and send one side only, the mean update is linear in that side, so the mean of factors is the
    exact mean of products. For mixed ranks and scalings that holds only if every client's side is first expressed
    against the *full* shared side with *one* scaling; this function does that, and `FactorMean` then is exact.

    Args:
        trained: The client's A [k, i] or B [o, k], trained against the first k ≤ r ranks of the shared side.
        shared: The server's factors [r, i], [o, r]; only the side that is not trained, and the scaling, are used.
        side: Which side was trained, ``a`` or ``b``.
        scaling: The client's own scaling, > 0.

    Returns:
        Factors of the server's rank and scaling: the trained side, scaled and zero-padded, and the shared side.

    Raises:
        ShapeError: The trained side does not fit the layer, or its rank is above the shared side's.
        ValueError: The scaling is not a positive finite number.

    Source:
        Sun et al. 2024 (FFA-LoRA, arXiv 2403.12313) for a fixed A; Chen et al. 2024 (RoLoRA, arXiv 2409.02346) for
        alternating sides. Differs in that ranks and scalings may be mixed.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"scaling: expected a finite number > 0, got {scaling}")
    full = shared.lora_a.shape if side == "a" else shared.lora_b.shape
    axis = 0 if side == "a" else 1
    width = full[1 - axis]
    if trained.ndim != 2 or trained.shape[1 - axis] != width or trained.shape[axis] > full[axis]:
        raise ShapeError(f"lora_{side}: expected {full} or a smaller rank, got {trained.shape}")
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, full[axis] - trained.shape[axis])
    padded = np.pad(_times(trained, scaling, shared.scaling), padding)
    if side == "a":
        return LoraFactors(padded, shared.lora_b, shared.scaling)
    return LoraFactors(shared.lora_a, padded, shared.scaling)


def _times(array: np.ndarray, numerator: float, denominator: float) -> np.ndarray:
    """Multiply by a ratio in float64, then round once to float32."""
    return np.multiply(array, numerator / denominator, dtype=np.float64).astype(np.float32)
