"""Settings of where a run executes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.tree import require

DATA_PATH_VARIABLE = "FEDLLM_DATA_PATH"
MODEL_PATH_VARIABLE = "FEDLLM_MODEL_PATH"
STATE_PATH_VARIABLE = "FEDLLM_STATE_PATH"
"""A folder in which a node keeps what its clients must not lose and must not send."""
FORGET_VARIABLE = "FEDLLM_FORGET"
"""The clients of a node that have asked to be forgotten, by partition id, with commas between them: these alone answer
the questions of a verification."""
NODE_PATHS = {
    "data-path": DATA_PATH_VARIABLE,
    "model-path": MODEL_PATH_VARIABLE,
    "state-path": STATE_PATH_VARIABLE,
}
"""The facts of a node config that name places on the node, and the variables that stand in for them."""
MAX_MESSAGE_MB = 1024.0
"""Default of the largest message, in MB (10⁶ bytes): of a reply at the server, of an instruction at a node."""
NODE_LOCAL_FIELDS = ("data_path", "model_path")
"""Runtime fields that name files. They reach a node by these environment variables or by its node config, never by a
message, so that a run cannot point a node at a file."""


def place_of(facts: Mapping[str, object]) -> tuple[int, int]:
    """Which place a node takes among those that host clients, and how many there are.

    Args:
        facts: Its node config.

    Raises:
        ConfigError: Its node config does not say.
    """
    given = {name: facts.get(name) for name in ("partition-id", "num-partitions")}
    try:
        place, total = (int(value) for value in given.values())  # type: ignore[call-overload]
    except (TypeError, ValueError):
        shown = " ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"node config: expected whole numbers partition-id and num-partitions, got {shown}"
        ) from None
    return place, total


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where a run executes.

    Nothing here changes what is computed beyond rounding (``cohort_tokens``, ``state_cache_mib``, ``dtype``).
    """

    name: Literal["loopback", "simulation", "deployment"]
    num_nodes: int = 2
    workers: int = 2
    threads: int = 1
    gpus_per_worker: float = 0.0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cohort_tokens: int = 512
    state_cache_mib: int = 512
    clients_per_wave: int = 16
    node_wait_seconds: float = 120.0
    max_message_mb: float = MAX_MESSAGE_MB
    connection: str = ""
    verbose: bool = False
    mlflow: bool = False
    data_path: str = ""
    model_path: str = ""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_nodes", "workers", "threads", "clients_per_wave"):
            require(
                getattr(self, name) >= 1,
                f"runtime.{name}: expected >= 1, got {getattr(self, name)}",
            )
        require(
            self.cohort_tokens >= 0,
            f"runtime.cohort_tokens: expected >= 0 (0 = serial), got {self.cohort_tokens}",
        )
        require(
            self.state_cache_mib >= 0,
            f"runtime.state_cache_mib: expected >= 0 (0 = off), got {self.state_cache_mib}",
        )
        require(
            self.gpus_per_worker >= 0,
            f"runtime.gpus_per_worker: expected >= 0, got {self.gpus_per_worker}",
        )
        require(
            self.node_wait_seconds > 0,
            f"runtime.node_wait_seconds: expected > 0, got {self.node_wait_seconds}",
        )
        require(
            self.max_message_mb > 0,
            f"runtime.max_message_mb: expected > 0, got {self.max_message_mb}",
        )
