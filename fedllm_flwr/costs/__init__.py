"""Bytes on the wire and operations by formula, without torch; runs measure theirs.

`shapes` is what the formulas depend on, `wire` counts bytes, `codecs` those of each codec, `compute` counts operations,
`account` puts bytes and operations into two tables, `memory` counts what training holds, and `tables` renders all.
"""

from fedllm_flwr.costs.account import FullRow, PublishedRow, full_row, published_row
from fedllm_flwr.costs.codecs import codec_bytes, grass_matrices, lora_matrices
from fedllm_flwr.costs.compute import EdgeFlops, edge_flops, lora_step_flops, server_flops
from fedllm_flwr.costs.memory import MemoryRow, SparsityRow, memory_row, memory_rows, sparsity_rows
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
    "MemoryRow",
    "ModelShape",
    "PublishedRow",
    "SparsityRow",
    "SplitSizes",
    "codec_bytes",
    "controller_parameters",
    "cost_tables",
    "edge_flops",
    "exchange_bytes",
    "full_row",
    "grass_matrices",
    "lora_bytes",
    "lora_matrices",
    "lora_parameters",
    "lora_step_flops",
    "memory_row",
    "memory_rows",
    "model_shape",
    "prompt_bytes",
    "published_row",
    "server_flops",
    "sparsity_rows",
    "to_csv",
    "to_json",
    "to_markdown",
]
