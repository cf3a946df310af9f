"""How flat values become bytes on the wire and come back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.codecs.base import Codec, Shapes, count_values
from fedllm_flwr.codecs.blockwise import BlockwiseCodec
from fedllm_flwr.codecs.differences import decode_difference, encode_difference
from fedllm_flwr.codecs.floats import FloatCodec
from fedllm_flwr.codecs.low_rank import LowRankCodec
from fedllm_flwr.codecs.top_k import TopKCodec

CodecName = Literal["float32", "float16", "bfloat16", "int8", "int4", "top_k", "low_rank"]


@dataclass(frozen=True)
class CodecSettings:
    """What the codecs can be told.

    Attributes:
        block_size: Values under one scale, of ``int8`` and ``int4``.
        top_k_fraction: Of the values of a part, of ``top_k``.
        low_rank: Rank of each matrix, of ``low_rank``.
    """

    block_size: int = 256
    top_k_fraction: float = 0.1
    low_rank: int = 4


FLOAT_CODECS = {name: FloatCodec(name) for name in ("float32", "float16", "bfloat16")}
"""The codecs that carry values; the others leave something out and carry differences."""

CODECS: dict[str, Callable[[CodecSettings], Codec]] = {
    "float32": lambda _: FLOAT_CODECS["float32"],
    "float16": lambda _: FLOAT_CODECS["float16"],
    "bfloat16": lambda _: FLOAT_CODECS["bfloat16"],
    "int8": lambda settings: BlockwiseCodec(8, settings.block_size),
    "int4": lambda settings: BlockwiseCodec(4, settings.block_size),
    "top_k": lambda settings: TopKCodec(settings.top_k_fraction),
    "low_rank": lambda settings: LowRankCodec(settings.low_rank),
}
"""The closed table of codecs."""

__all__ = [
    "CODECS",
    "FLOAT_CODECS",
    "BlockwiseCodec",
    "Codec",
    "CodecName",
    "CodecSettings",
    "FloatCodec",
    "LowRankCodec",
    "Shapes",
    "TopKCodec",
    "count_values",
    "decode_difference",
    "encode_difference",
]
