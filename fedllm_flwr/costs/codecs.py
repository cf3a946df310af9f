"""Bytes of one message's values under each codec, from the shapes of what is sent.

The formulas are written here a second time, apart from the codecs themselves: a prediction, which tests hold against
the arrays that the codecs make.

Axes: m rows and n columns of a matrix, N values of a message's part, r rank, k values kept.
"""

import math
from collections.abc import Iterable, Sequence

from fedllm_flwr.costs.wire import FLOAT_BYTES
from fedllm_flwr.errors import ConfigError

Matrices = Sequence[tuple[int, int]]
"""Rows and columns of each matrix of a part."""

PLACE_BYTES = 4
"""Of a value that is sent alone, as int32."""


def codec_bytes(
    matrices: Matrices, *, block_size: int = 256, top_k_fraction: float = 0.1, low_rank: int = 4
) -> dict[str, int]:
    """Bytes one way under each codec; headers of messages are not in it.

    Args:
        matrices: What is sent.
        block_size: Values under one scale, of ``int8`` and ``int4``.
        top_k_fraction: Of the values, of ``top_k``; a bitmap has their places where that is smaller.
        low_rank: Rank of each matrix, of ``low_rank``; matrices that it would not make smaller go as they are.

    Raises:
        ConfigError: A size is below 1, or the fraction is not in (0, 1].
    """
    for name, size in (("block_size", block_size), ("low_rank", low_rank)):
        if size < 1:
            raise ConfigError(f"costs: expected {name} >= 1, got {size}")
    if not 0 < top_k_fraction <= 1:
        raise ConfigError(f"costs: expected top_k_fraction in (0, 1], got {top_k_fraction}")
    values = sum(rows * columns for rows, columns in matrices)
    scales = FLOAT_BYTES * math.ceil(values / block_size)
    kept = math.ceil(top_k_fraction * values)
    return {
        "float32": FLOAT_BYTES * values,
        "float16": 2 * values,
        "bfloat16": 2 * values,
        "int8": values + scales,
        "int4": math.ceil(values / 2) + scales,
        "top_k": FLOAT_BYTES * kept + min(PLACE_BYTES * kept, math.ceil(values / 8)),
        "low_rank": FLOAT_BYTES
        * sum(min(low_rank * (rows + columns), rows * columns) for rows, columns in matrices),
    }


def lora_matrices(layers: Iterable[tuple[int, int]], rank: int) -> list[tuple[int, int]]:
    """Both factors of LoRA, A [r, i] and B [o, r] for each layer.

    Args:
        layers: Inputs i and outputs o of each adapted layer.
        rank: r.
    """
    return [matrix for inputs, outputs in layers for matrix in ((rank, inputs), (outputs, rank))]


def grass_matrices(layers: Iterable[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """The rows that clients of ``method=fedgrass`` send: the weights of r outputs of each layer, whole.

    Args:
        layers: Inputs i and outputs o of each layer.
        rows: r; a layer with fewer sends all that it has.

    Source:
        Muhamed et al. 2024 (GRASS, arXiv 2406.17660). Departure: the paper takes rows of the smaller side. Which rows
        they are travels in a message's body, and is not in it.
    """
    return [(min(rows, outputs), inputs) for inputs, outputs in layers]
