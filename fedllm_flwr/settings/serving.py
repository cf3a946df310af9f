"""Settings of the HTTP server; the model and its adapter are those of the run that is served."""

from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.settings.tree import require

TOKEN_VARIABLE = "FEDLLM_SERVE_TOKEN"  # noqa: S105  # the name of a variable
"""The bearer token that requests must carry; needed unless only this machine can reach the server."""


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How ``action=serve`` listens, queues and limits."""

    host: str = "127.0.0.1"
    port: int = 8000
    prompt: Literal["chat", "task"] = "chat"
    max_batch: int = 32
    max_wait_seconds: float = 0.1
    max_queue: int = 256
    timeout_seconds: float = 120.0
    max_context_tokens: int = 2048
    max_new_tokens: int = 256
    max_samples: int = 8
    max_body_bytes: int = 262144

    def __post_init__(self) -> None:
        """Check ranges."""
        require(bool(self.host), "serving.host: expected a host name or an address, got nothing")
        require(
            0 <= self.port <= 65535, f"serving.port: expected 0 (any) to 65535, got {self.port}"
        )
        for name in ("max_batch", "max_queue", "max_new_tokens", "max_samples", "max_body_bytes"):
            value = getattr(self, name)
            require(value >= 1, f"serving.{name}: expected >= 1, got {value}")
        require(
            self.max_wait_seconds >= 0,
            f"serving.max_wait_seconds: expected >= 0, got {self.max_wait_seconds:g}",
        )
        require(
            self.timeout_seconds > 0,
            f"serving.timeout_seconds: expected > 0, got {self.timeout_seconds:g}",
        )
        require(
            self.max_context_tokens > self.max_new_tokens,
            f"serving.max_context_tokens: expected more than the {self.max_new_tokens} tokens of an answer, "
            f"got {self.max_context_tokens}",
        )
