"""Bytes on the wire and operations by formula, without torch; runs measure theirs.

`shapes` is what the formulas depend on, `wire` counts bytes, `compute` counts operations, `account` puts both into two
tables, and `tables` renders them.
"""

from fedllm_flwr.costs.account import FullRow, PublishedRow, full_row, published_row
from fedllm_flwr.costs.compute import EdgeFlops, edge_flops, lora_step_flops, server_flops
from fedllm_flwr.costs.shapes import PUBLISHED_SHAPES, ModelShape, SplitSizes, model_shape
from fedllm_flwr.costs.tables import FORMATS, CostTables, cost_tables, to_csv, to_json, to_markdown
from fedllm_flwr.costs.wire import (
    ExchangeBytes,
    controller_parameters,
    exchange_bytes,
    lora_bytes,
    lora_parameters,
    prompt_bytes,
)

__all__ = [
    "FORMATS",
    "PUBLISHED_SHAPES",
    "CostTables",
    "EdgeFlops",
    "ExchangeBytes",
    "FullRow",
    "ModelShape",
    "PublishedRow",
    "SplitSizes",
    "controller_parameters",
    "cost_tables",
    "edge_flops",
    "exchange_bytes",
    "full_row",
    "lora_bytes",
    "lora_parameters",
    "lora_step_flops",
    "model_shape",
    "prompt_bytes",
    "published_row",
    "server_flops",
    "to_csv",
    "to_json",
    "to_markdown",
]
