"""Means of LoRA adapters over a cohort: of the factors, of the products, and what lies between the two.

Axes: r = rank, i = input features, o = output features, R = inner width of a stacked update.
Clients come in one at a time; sums are float64, results float32. A refused client leaves the sums as they were.
"""

import numpy as np

from fedllm_flwr.averaging.checks import check_values, check_weight
from fedllm_flwr.averaging.lora import Adapter, Delta, LoraFactors, LowRank
from fedllm_flwr.averaging.low_rank import (
    add_low_rank,
    as_low_rank,
    compact,
    negate,
    product_of,
)
from fedllm_flwr.errors import ShapeError, WireError


class _Cohort:
    """What the clients of one mean must have in common, and the weight that came in so far."""

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._count = 0
        self._shapes: dict[str, tuple[int, int]] = {}

    def check(self, adapter: Adapter, weight: float, client: int | str | None) -> str:
        """Refuse an adapter whose layers, widths, values or weight do not fit; return the client's name."""
        who = f"client {self._count if client is None else client}"
        check_weight(weight, who)
        if not adapter:
            raise ShapeError(f"{who}: expected factors of at least one layer, got none")
        for layer in dict.fromkeys((*self._shapes, *adapter)) if self._count else ():
            if layer not in adapter:
                raise ShapeError(f"{who}, layer {layer}: expected factors, got none")
            if layer not in self._shapes:
                raise ShapeError(f"{who}, layer {layer}: expected no such layer, got factors")
        for layer, factors in adapter.items():
            shape = (factors.out_features, factors.in_features)
            expected = self._shapes.get(layer, shape)
            if shape != expected:
                raise ShapeError(f"{who}, layer {layer}: expected (o, i) = {expected}, got {shape}")
            check_values(factors.lora_a, f"{who}, layer {layer}.lora_a")
            check_values(factors.lora_b, f"{who}, layer {layer}.lora_b")
        return who

    def admit(self, adapter: Adapter, weight: float) -> None:
        """Count a client that was checked; the first one fixes the layers and their widths."""
        if not self._count:
            self._shapes = {
                layer: (factors.out_features, factors.in_features)
                for layer, factors in adapter.items()
            }
        self._count += 1
        self.total_weight += weight

    def total(self) -> float:
        """The total weight, which is positive."""
        if not self._count:
            raise WireError("mean: expected at least one client, got none (the total weight is 0)")
        return self.total_weight


class FactorMean:
    """Weighted mean of A and weighted mean of B, each by itself.

    Smaller ranks are padded with zeros, never broadcast, and a client's scaling sₖ is folded into its B, so that
    clients of different alpha count with the updates they really made: Ā = Σ wₖ Aₖ / Σ wₖ and
    B̄ = Σ wₖ (sₖ / s) Bₖ / Σ wₖ.

    The update s · B̄ Ā differs from the clients' mean update by a cross term, which is zero when all clients share A
    (or share B with one scaling; see `lora.beside_shared` for one shared side with mixed ranks and scalings). Use
    `ProductMean` when the term matters, or carry it along with `residual`.

    Source:
        McMahan et al. 2017, Algorithm 1, on the factors, as Zhang et al. 2024 (FedIT, arXiv 2305.05644) do; padding
        as Cho et al. 2024 (HetLoRA, arXiv 2401.06432). Differs from HetLoRA in that clients count by their weights,
        not by the norms of their updates, and from both in that scalings may be mixed.
    """

    def __init__(self, *, rank: int, scaling: float) -> None:
        """Start an empty mean.

        Args:
            rank: Rank r of the result, > 0; no client's rank may be above it.
            scaling: Scaling s of the result, > 0.

        Raises:
            ValueError: The rank or the scaling is not positive.
        """
        if not (rank > 0 and scaling > 0):
            raise ValueError(f"expected rank > 0 and scaling > 0, got {rank} and {scaling}")
        self._rank = rank
        self._scaling = scaling
        self._cohort = _Cohort()
        self._sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, adapter: Adapter, weight: float, *, client: int | str | None = None) -> None:
        """Add one client's adapter; it is read once and not kept.

        Args:
            adapter: Factors by layer name, of any rank up to r and any scaling.
            weight: Unnormalised weight, > 0.
            client: Who sent it, for messages; defaults to the number of clients before it.

        Raises:
            ShapeError: Layers or widths differ from the first client's, or a rank is above r; names client and layer.
            WireError: The dtype, a value or the weight is refused; names the client.
        """
        who = self._cohort.check(adapter, weight, client)
        for layer, factors in adapter.items():
            if factors.rank > self._rank:
                raise ShapeError(
                    f"{who}, layer {layer}: expected a rank of at most {self._rank}, got {factors.rank}"
                )
        for layer, factors in adapter.items():
            if layer not in self._sums:
                self._sums[layer] = self._zeros(factors)
            sum_a, sum_b = self._sums[layer]
            rank = factors.rank
            sum_a[:rank] += _wide(factors.lora_a, weight)
            sum_b[:, :rank] += _wide(factors.lora_b, weight * factors.scaling / self._scaling)
        self._cohort.admit(adapter, weight)

    def result(self) -> dict[str, LoraFactors]:
        """The mean factors by layer, of rank r and scaling s.

        Raises:
            WireError: Nothing was added.
        """
        total = self._cohort.total()
        return {
            layer: LoraFactors(
                (sum_a / total).astype(np.float32),
                (sum_b / total).astype(np.float32),
                self._scaling,
            )
            for layer, (sum_a, sum_b) in self._sums.items()
        }

    def _zeros(self, factors: LoraFactors) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.zeros((self._rank, factors.in_features)),
            np.zeros((factors.out_features, self._rank)),
        )


class _ProductSum:
    """Running Σ cₖ Bₖ Aₖ of one layer: a stack of factors, which is flushed into one dense float64 sum when it is full.

    A stack is full at rank min(o, i), beyond which a dense matrix is smaller. Flushing a whole stack at once, even when
    the sum is dense already, is one pass over that sum for many clients.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self._shape = (out_features, in_features)
        self._terms: list[tuple[float, np.ndarray, np.ndarray]] = []
        self._rank = 0
        self._dense: np.ndarray | None = None

    def add(self, coefficient: float, lora_b: np.ndarray, lora_a: np.ndarray) -> None:
        # Copies: the arrays may be views of a message that would otherwise stay in memory or be overwritten.
        self._terms.append(
            (coefficient, np.array(lora_b, np.float32), np.array(lora_a, np.float32))
        )
        self._rank += lora_a.shape[0]
        if self._rank >= min(self._shape):
            self._flush()

    def result(self, total: float) -> LowRank:
        if self._dense is None:
            left, right = self._stacked(total)
            return LowRank(left.astype(np.float32), right)
        if self._terms:
            self._flush()
        return as_low_rank(self._dense / total)

    def _stacked(self, total: float) -> tuple[np.ndarray, np.ndarray]:
        lefts = [_wide(lora_b, coefficient / total) for coefficient, lora_b, _ in self._terms]
        rights = [lora_a for _, _, lora_a in self._terms]
        return np.concatenate(lefts, axis=1), np.concatenate(rights)

    def _flush(self) -> None:
        left, right = self._stacked(1.0)
        product = left @ right.astype(np.float64)
        self._dense = product if self._dense is None else self._dense + product
        self._terms, self._rank = [], 0


class ProductMean:
    """Exact weighted mean of the clients' updates, Σ wₖ sₖ Bₖ Aₖ / Σ wₖ, for any ranks and scalings.

    Factors are stacked: left columns wₖ sₖ Bₖ / Σ w, right rows Aₖ. A layer whose stacked rank reaches min(o, i) turns
    into a dense float64 sum, so memory is bounded by the layers' sizes and not by the cohort. Which axis is the rank
    is known from the factor, never guessed from its shape, so a layer as wide as the rank is nothing special.

    Source:
        Wang et al. 2024 (FLoRA, arXiv 2409.05976), stacking-based aggregation. Differs in that weights and scalings go
        into the left side only, and in the dense form for large cohorts.
    """

    def __init__(self) -> None:
        self._cohort = _Cohort()
        self._sums: dict[str, _ProductSum] = {}

    def add(self, adapter: Adapter, weight: float, *, client: int | str | None = None) -> None:
        """Add one client's adapter.

        Args:
            adapter: Factors by layer name, of any rank and scaling.
            weight: Unnormalised weight, > 0.
            client: Who sent it, for messages; defaults to the number of clients before it.

        Raises:
            ShapeError: Layers or widths differ from the first client's; names client and layer.
            WireError: The dtype, a value or the weight is refused; names the client.
        """
        self._cohort.check(adapter, weight, client)
        for layer, factors in adapter.items():
            if layer not in self._sums:
                self._sums[layer] = _ProductSum(factors.out_features, factors.in_features)
            self._sums[layer].add(weight * factors.scaling, factors.lora_b, factors.lora_a)
        self._cohort.admit(adapter, weight)

    def result(self) -> dict[str, LowRank]:
        """The mean update by layer, with every scaling inside.

        Raises:
            WireError: Nothing was added.
        """
        total = self._cohort.total()
        return {layer: layer_sum.result(total) for layer, layer_sum in self._sums.items()}


def residual(product_mean: Delta, factors: Adapter) -> dict[str, LowRank]:
    """What the product of mean factors lacks of the exact mean update: ΔW̄ - s B̄ Ā, layer by layer.

    Clients go on from the mean factors and carry the residual as a frozen update, so that nothing is lost.

    Args:
        product_mean: The exact mean update, from `ProductMean`.
        factors: The mean factors, from `FactorMean` over the same clients and weights.

    Returns:
        The residual by layer, exact, compacted where its inner width would be above min(o, i).

    Raises:
        ShapeError: The two do not have the same layers and widths; names the layer.

    Source:
        Singhal et al. 2025 (FedEx-LoRA, arXiv 2410.09432): its residual error term. Differs in that clients may differ
        in weight, rank and scaling, and in that the residual stays low rank while that is smaller.
    """
    for layer in dict.fromkeys((*product_mean, *factors)):
        if layer not in product_mean or layer not in factors:
            holder = "mean update" if layer in product_mean else "mean factors"
            raise ShapeError(f"layer {layer}: expected in both means, got it in the {holder} only")
        shape = (factors[layer].out_features, factors[layer].in_features)
        if product_mean[layer].shape != shape:
            raise ShapeError(
                f"layer {layer}: expected (o, i) = {product_mean[layer].shape}, got {shape}"
            )
    return {
        layer: compact(add_low_rank(update, negate(product_of(factors[layer]))))
        for layer, update in product_mean.items()
    }


def _wide(array: np.ndarray, factor: float) -> np.ndarray:
    """The array times a number, in float64: widened first, since half precision overflows at 65504."""
    wide = array.astype(np.float64)
    wide *= factor
    return wide
