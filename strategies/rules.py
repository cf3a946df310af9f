"""From clients' adapters to the next global model: the rules of ``strategy=…``.

The global model is the frozen backbone, one adapter that clients go on training, and a carried delta: frozen low-rank
updates that no adapter of the cohort's rank can hold. Each rule streams: a client's factors are dropped once added.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import threadpool_limits

from fedllm_flwr.averaging import (
    Delta,
    FactorMean,
    LoraFactors,
    LowRank,
    ProductMean,
    add_low_rank,
    best_rank,
    compact,
    residual,
)
from fedllm_flwr.averaging.server_optimizer import ServerOptimizer, State
from fedllm_flwr.models.adapters import AdapterLayout

Factors = dict[str, LoraFactors]


@dataclass(frozen=True)
class GlobalModel:
    """What the server knows after a round.

    Attributes:
        factors: The adapter that clients start from.
        delta: Frozen update per layer that is added to the backbone; empty for rules without one.
        optimizer: State of the server optimizer.
    """

    factors: Factors
    delta: Delta = field(default_factory=dict)
    optimizer: State | None = None


class FactorMeanRule:
    """Weighted mean of A and of B, then a server optimizer step.

    The mean of products is not the product of means, so this differs from the exact mean unless one side is shared.

    Source:
        McMahan et al. 2017, Algorithm 1, on LoRA factors; Reddi et al. 2021, Algorithm 2 for the server optimizers;
        mixed ranks are zero-padded (Cho et al. 2024, HetLoRA, without its pruning and its norm weights).
    """

    sends_adapter = True

    def __init__(self, layout: AdapterLayout, scaling: float, optimizer: ServerOptimizer) -> None:
        self._layout, self._scaling, self._optimizer = layout, scaling, optimizer
        self._mean = FactorMean(rank=layout.rank, scaling=scaling)

    def add(self, adapter: Mapping[str, LoraFactors], weight: float, client: int) -> None:
        """Add one client's factors."""
        self._mean.add(adapter, weight, client=client)

    def finish(self, current: GlobalModel, server_round: int) -> GlobalModel:
        """The next global model."""
        before = {"adapter": self._layout.pack(current.factors)}
        mean = {"adapter": self._layout.pack(self._mean.result())}
        state = current.optimizer or self._optimizer.init(before)
        state, after = self._optimizer.apply(state, before, mean, server_round)
        factors = self._layout.unpack(after["adapter"], self._scaling)
        return GlobalModel(factors, current.delta, state)


class StackRule:
    """Exact: the clients' products are stacked into the carried delta, and every adapter starts anew.

    Source:
        Wang et al. 2024 (FLoRA, arXiv 2409.05976). Differs in that the sum is kept as factors beside the frozen
        backbone, never merged into it, so workers share one copy and nothing is rounded to the backbone's dtype.
    """

    sends_adapter = False

    def __init__(self) -> None:
        self._mean = ProductMean()

    def add(self, adapter: Mapping[str, LoraFactors], weight: float, client: int) -> None:
        """Add one client's factors."""
        self._mean.add(adapter, weight, client=client)

    def finish(self, current: GlobalModel, server_round: int) -> GlobalModel:
        """The next global model; clients draw their next adapters from the round's address."""
        return GlobalModel(
            current.factors, _carry(current.delta, self._mean.result()), current.optimizer
        )


class ResidualRule:
    """Exact: the factor mean goes on, and what it misses of the mean product goes into the carried delta.

    Source:
        Singhal et al. 2024 (FedEx-LoRA, arXiv 2410.09432). Differs in that the residual stays factored, see
        :class:`StackRule`.
    """

    sends_adapter = True

    def __init__(self, rank: int, scaling: float) -> None:
        self._factors = FactorMean(rank=rank, scaling=scaling)
        self._products = ProductMean()

    def add(self, adapter: Mapping[str, LoraFactors], weight: float, client: int) -> None:
        """Add one client's factors."""
        self._factors.add(adapter, weight, client=client)
        self._products.add(adapter, weight, client=client)

    def finish(self, current: GlobalModel, server_round: int) -> GlobalModel:
        """The next global model."""
        factors = self._factors.result()
        missed = residual(self._products.result(), factors)
        return GlobalModel(factors, _carry(current.delta, missed), current.optimizer)


class SvdRule:
    """The best approximation of the exact mean product whose rank is the server's.

    Source:
        Bai et al. 2024 (FlexLoRA, arXiv 2402.11505); Eckart and Young 1936 for "best".
    """

    sends_adapter = True

    def __init__(self, scaling: float, fresh: Mapping[str, LoraFactors]) -> None:
        self._scaling, self._fresh = scaling, fresh
        self._mean = ProductMean()

    def add(self, adapter: Mapping[str, LoraFactors], weight: float, client: int) -> None:
        """Add one client's factors."""
        self._mean.add(adapter, weight, client=client)

    def finish(self, current: GlobalModel, server_round: int) -> GlobalModel:
        """The next global model."""
        with threadpool_limits(1):  # one thread: the same bits in every process
            factors = {
                name: _alive(
                    best_rank(product, self._fresh[name].rank, self._scaling), self._fresh[name]
                )
                for name, product in self._mean.result().items()
            }
        return GlobalModel(factors, current.delta, current.optimizer)


Rule = FactorMeanRule | StackRule | ResidualRule | SvdRule


def make_rule(
    name: str,
    layout: AdapterLayout,
    scaling: float,
    optimizer: ServerOptimizer,
    fresh: Mapping[str, LoraFactors],
) -> Rule:
    """A new sum for one round under a rule of ``strategy=…``.

    Args:
        name: The rule.
        layout: Of the server's adapter.
        scaling: Of the server's adapter.
        optimizer: Steps on the mean of factors; used by ``factor_mean``.
        fresh: The run's first adapter, from whose A ``svd`` takes rows for ranks that carry nothing.
    """
    if name in ("factor_mean", "sift_merge"):  # whose mean is made before, and comes as one reply
        return FactorMeanRule(layout, scaling, optimizer)
    if name == "stack":
        return StackRule()
    if name == "residual":
        return ResidualRule(layout.rank, scaling)
    return SvdRule(scaling, fresh)


def _alive(factors: LoraFactors, fresh: LoraFactors) -> LoraFactors:
    """Give ranks that carry nothing a fresh row of A: with A = B = 0 no gradient would ever reach them."""
    unused = np.logical_not(np.any(factors.lora_a, axis=1) | np.any(factors.lora_b, axis=0))
    lora_a = np.where(unused.reshape(-1, 1), fresh.lora_a, factors.lora_a)
    return LoraFactors(lora_a, factors.lora_b, factors.scaling)


def _carry(delta: Delta, more: Delta) -> dict[str, LowRank]:
    """Add to the carried delta, rewritten densely (exactly) where its rank outgrows the layer."""
    return {
        name: compact(add_low_rank(delta[name], extra) if name in delta else extra)
        for name, extra in more.items()
    }
