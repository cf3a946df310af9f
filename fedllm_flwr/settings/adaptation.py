"""Settings of what is adapted, to what, and how a client trains: model, task, optimizer, local work."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal, get_args

from fedllm_flwr.models.catalog import MODELS, ModelRef, Quantization
from fedllm_flwr.settings.tree import require
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import check_options


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which frozen language model is adapted (``hub_id`` and ``revision`` are read by ``hub`` only).

    ``quantization`` holds its linear layers in 8 or 4 bits, through bitsandbytes.
    """

    name: str
    hub_id: str = ""
    revision: str = ""
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        """Reject unknown models and anything that looks like a path on a node."""
        require(
            self.name in MODELS, f"model.name: expected one of {sorted(MODELS)}, got {self.name!r}"
        )
        require(
            self.quantization in get_args(Quantization),
            f"model.quantization: expected one of {', '.join(get_args(Quantization))}, got {self.quantization!r}",
        )
        require(
            (self.name == "hub") == bool(self.hub_id),
            f"model.hub_id: belongs to model=hub and is needed there, got name={self.name!r} hub_id={self.hub_id!r}",
        )
        require(
            not self.hub_id
            or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.hub_id) is not None,
            f"model.hub_id: expected owner/name, got {self.hub_id!r} (local folder: model=path, runtime.model_path)",
        )

    def ref(self, model_path: str) -> ModelRef:
        """The model to load; ``model_path`` is the node's own and is read by ``model=path`` only."""
        path = model_path if self.name == "path" else ""
        return ModelRef(
            name=self.name,
            hub_id=self.hub_id,
            path=path,
            revision=self.revision,
            quantization=self.quantization,
        )


@dataclass(frozen=True, kw_only=True)
class TaskConfig(TaskOptions):
    """The data set, and how its rows become tokens and a loss."""

    loss: Literal["labels", "vocabulary"] = "labels"
    template: str = ""
    max_tokens: int = 128

    def __post_init__(self) -> None:
        """Check the data set's options, and the fields that this class adds."""
        super().__post_init__()
        check_options(self.options(""))
        require(self.max_tokens >= 16, f"task.max_tokens: expected >= 16, got {self.max_tokens}")

    def options(self, data_path: str) -> TaskOptions:
        """The loader's options; ``data_path`` is the node's own."""
        names = [f.name for f in dataclasses.fields(TaskOptions)]
        return TaskOptions(
            **{name: getattr(self, name) for name in names} | {"data_path": data_path}
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The client's optimizer."""

    name: Literal["adamw", "sgd"]
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.learning_rate > 0,
            f"optimizer.learning_rate: expected > 0, got {self.learning_rate}",
        )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay: expected >= 0, got {self.weight_decay}",
        )
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}: expected in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """The local work of one client in one round; exactly one of ``local_epochs`` and ``local_steps`` is set."""

    batch_size: int = 8
    local_epochs: int = 1
    local_steps: int = 0
    gradient_accumulation: int = 1
    clip_norm: float = 1.0
    proximal_mu: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: int = 0
    minimum_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Check ranges and the pair of epochs and steps."""
        for name in ("batch_size", "gradient_accumulation"):
            require(
                getattr(self, name) >= 1, f"client.{name}: expected >= 1, got {getattr(self, name)}"
            )
        for name in ("local_epochs", "local_steps", "clip_norm", "proximal_mu", "warmup_rounds"):
            require(
                getattr(self, name) >= 0, f"client.{name}: expected >= 0, got {getattr(self, name)}"
            )
        require(
            (self.local_epochs > 0) != (self.local_steps > 0),
            "client.local_epochs and client.local_steps: expected exactly one above 0, got "
            f"local_epochs={self.local_epochs} local_steps={self.local_steps}",
        )
        require(
            0 <= self.minimum_fraction <= 1,
            f"client.minimum_fraction: expected in [0, 1], got {self.minimum_fraction}",
        )
