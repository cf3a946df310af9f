"""Settings of the wire: how arrays travel in each direction, and which methods can bear what a codec leaves out."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.codecs import CODECS, FLOAT_CODECS, Codec, CodecName, CodecSettings
from fedllm_flwr.settings.methods import (
    FedLoraConfig,
    FedPromptConfig,
    FedResPromptConfig,
    MethodConfig,
)
from fedllm_flwr.settings.tree import require

Direction = Literal["uplink", "downlink"]
USES = {
    "block_size": ("int8", "int4"),
    "top_k_fraction": ("top_k",),
    "low_rank": ("low_rank",),
}
"""Setting -> the codecs that read it."""


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How arrays travel; sums are float64 whatever it is.

    float32, float16 and bfloat16 carry values. The others leave something out: up they carry a client's update, down
    the difference from the values that the run's seed gives. With ``error_feedback`` a client keeps what was left out
    of its update, and adds it to its next one.
    """

    name: str
    uplink: CodecName = "float32"
    downlink: CodecName = "float32"
    block_size: int = 256
    top_k_fraction: float = 0.1
    low_rank: int = 4
    error_feedback: bool = False

    def __post_init__(self) -> None:
        """Check ranges, and that no setting is without effect."""
        for name in ("block_size", "low_rank"):
            require(
                getattr(self, name) >= 1, f"wire.{name}: expected >= 1, got {getattr(self, name)}"
            )
        require(
            0 < self.top_k_fraction <= 1,
            f"wire.top_k_fraction: expected in (0, 1], got {self.top_k_fraction:g}",
        )
        for field in dataclasses.fields(self):
            readers, value = USES.get(field.name, ()), getattr(self, field.name)
            require(
                not readers or value == field.default or not {self.uplink, self.downlink}.isdisjoint(readers),
                f"wire.{field.name}={value}, wire.uplink={self.uplink} and wire.downlink={self.downlink}: only "
                f"{' and '.join(readers)} read it",
            )  # fmt: skip
        require(
            self.sends_updates or not self.error_feedback,
            f"wire.error_feedback=true and wire.uplink={self.uplink}: values are sent, and nothing is left out of an "
            "update that could be kept, use int8, int4, top_k or low_rank",
        )

    @property
    def sends_updates(self) -> bool:
        """Whether clients answer with updates, and not with values."""
        return self.uplink not in FLOAT_CODECS

    @property
    def sends_differences(self) -> bool:
        """Whether training messages carry differences from values that both sides know."""
        return self.downlink not in FLOAT_CODECS

    def codec(self, direction: Direction) -> Codec:
        """The codec of a direction, with its settings."""
        settings = CodecSettings(self.block_size, self.top_k_fraction, self.low_rank)
        return CODECS[self.uplink if direction == "uplink" else self.downlink](settings)


def check_wire(wire: WireConfig, method: MethodConfig, strategy: str) -> None:
    """Reject codecs that a method or a rule cannot bear, naming both.

    Args:
        wire: The codecs.
        method: What is trained.
        strategy: The rule.

    Raises:
        ConfigError: Two settings cannot be used together.
    """
    for direction in ("uplink", "downlink"):
        codec = getattr(wire, direction)
        require(
            not isinstance(method, FedResPromptConfig) or codec in FLOAT_CODECS,
            f"wire.{direction}={codec} and method=fedresprompt: prompts and their gradients are new in every exchange, "
            "so there is no known value to send a difference from, use float32, float16 or bfloat16",
        )
        if codec == "low_rank":
            _check_rank(wire.low_rank, direction, method)
    require(
        wire.downlink not in ("top_k", "low_rank") or strategy in ("factor_mean", "prompt_mean"),
        f"wire.downlink={wire.downlink} and strategy={strategy}: most of what the rule sends is in no small difference "
        "from the first adapter, use int8 or int4, or strategy=factor_mean",
    )
    require(
        not wire.error_feedback or strategy not in ("stack", "svd"),
        f"wire.error_feedback=true and strategy={strategy}: the factors begin anew in every round, so what was left "
        "out of the last ones has no place in the next, use error_feedback=false",
    )


def _check_rank(rank: int, direction: Direction, method: MethodConfig) -> None:
    """A rank that saves nothing for any matrix would send float32 under another name."""
    where = f"wire.{direction}=low_rank, wire.low_rank={rank}"
    if isinstance(method, FedLoraConfig):
        largest = method.server_spec().rank
        require(
            rank < largest,
            f"{where} and method.rank={largest}: factors of rank {largest} would not become smaller, expected a "
            "rank below it",
        )
    if isinstance(method, FedPromptConfig):
        require(
            method.kind in ("soft", "prompt_tuning"),
            f"{where} and method.kind={method.kind}: its values are no one matrix, use int8, int4 or top_k",
        )
        longest = max(method.length, method.cluster_length)
        require(
            rank < longest,
            f"{where} and method.length={method.length}: prompts of {longest} tokens would not become smaller, "
            "expected a rank below it",
        )
