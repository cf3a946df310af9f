"""Means of what clients send, and what the server makes of them; numpy only.

`weights` says how much each client counts, `mean` averages flat arrays, `lora` and `low_rank` hold adapters and exact
updates, `lora_means` averages them (by factor, by exact product, and the residual between the two), and
`server_optimizer` takes the server's step.
"""

from fedllm_flwr.averaging.lora import (
    Adapter,
    Delta,
    LoraFactors,
    LowRank,
    Side,
    beside_shared,
    rescale,
    resize,
)
from fedllm_flwr.averaging.lora_means import FactorMean, ProductMean, residual
from fedllm_flwr.averaging.low_rank import (
    add_low_rank,
    as_low_rank,
    best_rank,
    compact,
    dense,
    negate,
    product_of,
)
from fedllm_flwr.averaging.mean import RunningMean
from fedllm_flwr.averaging.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer, State
from fedllm_flwr.averaging.weights import Weighting, client_weight

__all__ = [
    "SERVER_OPTIMIZERS",
    "Adapter",
    "Delta",
    "FactorMean",
    "LoraFactors",
    "LowRank",
    "ProductMean",
    "RunningMean",
    "ServerOptimizer",
    "Side",
    "State",
    "Weighting",
    "add_low_rank",
    "as_low_rank",
    "beside_shared",
    "best_rank",
    "client_weight",
    "compact",
    "dense",
    "negate",
    "product_of",
    "rescale",
    "residual",
    "resize",
]
