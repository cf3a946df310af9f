"""The typed configuration of a run, and the one place where impossible settings fail.

Hydra composes plain YAML; :func:`run_config` turns the result into frozen dataclasses and checks every type,
range and pair before anything loads. The same function reads the JSON that travels in each message, so a node
needs no Hydra. ``runtime`` and ``out_dir`` say where and how a run executes, not what it computes: they are
outside the fingerprint.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fedllm_flwr.averaging import SERVER_OPTIMIZERS
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.catalog import MODELS, ModelRef
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import TASKS, check_options
from fedllm_flwr.tasks.partitions import PartitionOptions

T = TypeVar("T")

DATA_PATH_VARIABLE = "FEDLLM_DATA_PATH"
MODEL_PATH_VARIABLE = "FEDLLM_MODEL_PATH"
NODE_LOCAL_FIELDS = ("data_path", "model_path")
"""Runtime fields that name files. They reach a node by these environment variables or by its node config, never by a
message, so that a run cannot point a node at a file."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which frozen language model is adapted (``hub_id`` and ``revision`` are read by ``hub`` only)."""

    name: str
    hub_id: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        """Reject unknown models and anything that looks like a path on a node."""
        _require(
            self.name in MODELS, f"model.name: expected one of {sorted(MODELS)}, got {self.name!r}"
        )
        _require(
            (self.name == "hub") == bool(self.hub_id),
            f"model.hub_id: belongs to model=hub and is needed there, got name={self.name!r} hub_id={self.hub_id!r}",
        )
        _require(
            not self.hub_id
            or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.hub_id) is not None,
            f"model.hub_id: expected owner/name, got {self.hub_id!r} (local folder: model=path, runtime.model_path)",
        )

    def ref(self, model_path: str) -> ModelRef:
        """The model to load; ``model_path`` is the node's own and is read by ``model=path`` only."""
        path = model_path if self.name == "path" else ""
        return ModelRef(name=self.name, hub_id=self.hub_id, path=path, revision=self.revision)


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
        _require(self.max_tokens >= 16, f"task.max_tokens: expected >= 16, got {self.max_tokens}")

    def options(self, data_path: str) -> TaskOptions:
        """The loader's options; ``data_path`` is the node's own."""
        names = [f.name for f in dataclasses.fields(TaskOptions)]
        return TaskOptions(
            **{name: getattr(self, name) for name in names} | {"data_path": data_path}
        )


@dataclass(frozen=True, kw_only=True)
class FedLoraConfig:
    """LoRA adapters on PEFT. ``client_ranks`` and ``client_alphas`` are cycled over partition ids when not empty."""

    name: Literal["fedlora"]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_rslora: bool = False
    sharing: Literal["both", "b_only", "alternating"] = "both"
    client_ranks: tuple[int, ...] = ()
    client_alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            bool(self.target_modules),
            "method.target_modules: expected at least one layer name, got none",
        )
        for rank in (self.rank, *self.client_ranks):
            _require(rank >= 1, f"method.rank and client_ranks: expected >= 1, got {rank}")
        for alpha in (self.alpha, *self.client_alphas):
            _require(alpha > 0, f"method.alpha and client_alphas: expected > 0, got {alpha}")
        _require(0 <= self.dropout < 1, f"method.dropout: expected in [0, 1), got {self.dropout}")

    def spec(self, partition_id: int) -> LoraSpec:
        """The adapter that one client trains (rank and alpha may be its own)."""
        rank = (
            self.client_ranks[partition_id % len(self.client_ranks)]
            if self.client_ranks
            else self.rank
        )
        alpha = (
            self.client_alphas[partition_id % len(self.client_alphas)]
            if self.client_alphas
            else self.alpha
        )
        return self._spec(rank, alpha)

    def server_spec(self) -> LoraSpec:
        """The adapter that the server keeps: the largest rank of the federation, the configured alpha."""
        return self._spec(
            max((self.rank, *self.client_ranks)) if self.client_ranks else self.rank, self.alpha
        )

    def _spec(self, rank: int, alpha: float) -> LoraSpec:
        return LoraSpec(
            rank=rank,
            alpha=alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
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
        _require(
            self.learning_rate > 0,
            f"optimizer.learning_rate: expected > 0, got {self.learning_rate}",
        )
        _require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay: expected >= 0, got {self.weight_decay}",
        )
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}: expected in [0, 1), got {value}")


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
            _require(
                getattr(self, name) >= 1, f"client.{name}: expected >= 1, got {getattr(self, name)}"
            )
        for name in ("local_epochs", "local_steps", "clip_norm", "proximal_mu", "warmup_rounds"):
            _require(
                getattr(self, name) >= 0, f"client.{name}: expected >= 0, got {getattr(self, name)}"
            )
        _require(
            (self.local_epochs > 0) != (self.local_steps > 0),
            "client.local_epochs and client.local_steps: expected exactly one above 0, got "
            f"local_epochs={self.local_epochs} local_steps={self.local_steps}",
        )
        _require(
            0 <= self.minimum_fraction <= 1,
            f"client.minimum_fraction: expected in [0, 1], got {self.minimum_fraction}",
        )


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Who trains in a round, how replies merge, and what is done when some of them fail."""

    name: Literal["factor_mean", "stack", "residual", "svd"]
    cohort_fraction: float = 1.0
    weighting: Literal["examples", "uniform"] = "examples"
    server_optimizer: str = "fedavg"
    server_learning_rate: float = 0.0
    server_momentum: float = -1.0
    min_fraction: float = 0.5
    max_retries: int = 2
    round_timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        """Check ranges; 0 and -1 mean the server optimizer's own defaults."""
        _require(
            self.server_optimizer in SERVER_OPTIMIZERS,
            f"strategy.server_optimizer: expected one of {sorted(SERVER_OPTIMIZERS)}, got {self.server_optimizer!r}",
        )
        for name in ("cohort_fraction", "min_fraction"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"strategy.{name}: expected in (0, 1], got {value}")
        _require(
            self.max_retries >= 0, f"strategy.max_retries: expected >= 0, got {self.max_retries}"
        )
        _require(
            self.round_timeout_seconds > 0,
            f"strategy.round_timeout_seconds: expected > 0, got {self.round_timeout_seconds}",
        )
        _require(
            self.server_learning_rate >= 0,
            f"strategy.server_learning_rate: expected >= 0 (0 = its default), got {self.server_learning_rate}",
        )
        _require(
            self.server_momentum == -1 or 0 <= self.server_momentum < 1,
            f"strategy.server_momentum: expected in [0, 1) (-1 = the optimizer's default), got {self.server_momentum}",
        )


WIRE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """The dtype of adapter values in messages; sums are float64 whatever it is."""

    name: str
    uplink: Literal["float32", "float16", "bfloat16"] = "float32"
    downlink: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """What is measured beside the federated result; ``learning_rates`` are tried on validation rows."""

    name: str
    predictors: bool = True
    zero_shot: bool = True
    local_only: bool = False
    centralised: bool = False
    learning_rates: tuple[float, ...] = ()
    tuning_rounds: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            all(rate > 0 for rate in self.learning_rates),
            "baselines.learning_rates: expected all > 0",
        )
        _require(
            self.tuning_rounds >= 1,
            f"baselines.tuning_rounds: expected >= 1, got {self.tuning_rounds}",
        )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where a run executes. Nothing here changes what is computed beyond rounding (``cohort_tokens``, ``dtype``)."""

    name: Literal["loopback", "simulation", "deployment"]
    num_nodes: int = 2
    workers: int = 2
    threads: int = 1
    gpus_per_worker: float = 0.0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cohort_tokens: int = 512
    clients_per_wave: int = 16
    node_wait_seconds: float = 120.0
    connection: str = ""
    verbose: bool = False
    data_path: str = ""
    model_path: str = ""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_nodes", "workers", "threads", "clients_per_wave"):
            _require(
                getattr(self, name) >= 1,
                f"runtime.{name}: expected >= 1, got {getattr(self, name)}",
            )
        _require(
            self.cohort_tokens >= 0,
            f"runtime.cohort_tokens: expected >= 0 (0 = serial), got {self.cohort_tokens}",
        )
        _require(
            self.gpus_per_worker >= 0,
            f"runtime.gpus_per_worker: expected >= 0, got {self.gpus_per_worker}",
        )
        _require(
            self.node_wait_seconds > 0,
            f"runtime.node_wait_seconds: expected > 0, got {self.node_wait_seconds}",
        )


METHODS = {"fedlora": FedLoraConfig}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole."""

    experiment: str
    seed: int
    num_rounds: int
    evaluate_every: int = 1
    selection: Literal["last", "best_validation"] = "last"
    keep_checkpoints: int = 3
    model: ModelConfig
    task: TaskConfig
    partition: PartitionOptions
    method: FedLoraConfig
    optimizer: OptimizerConfig
    client: ClientConfig
    strategy: StrategyConfig
    wire: WireConfig
    baselines: BaselinesConfig
    runtime: RuntimeConfig
    out_dir: str = field(default="")

    def __post_init__(self) -> None:
        """Check ranges and the pairs that cannot work together."""
        _require(self.num_rounds >= 1, f"num_rounds: expected >= 1, got {self.num_rounds}")
        _require(
            self.evaluate_every >= 1, f"evaluate_every: expected >= 1, got {self.evaluate_every}"
        )
        _require(
            self.keep_checkpoints >= 1,
            f"keep_checkpoints: expected >= 1, got {self.keep_checkpoints}",
        )
        _require(
            self.partition.num_clients >= 1,
            f"partition.num_clients: expected >= 1, got {self.partition.num_clients}",
        )
        _require(self.seed >= 0, f"seed: expected >= 0, got {self.seed}")
        check_compatible(self)

    def to_json(self) -> str:
        """The whole configuration as canonical JSON, without the fields that name files on a node."""
        tree = dataclasses.asdict(self)
        for name in NODE_LOCAL_FIELDS:
            tree["runtime"].pop(name)
        tree["task"].pop("data_path")
        tree.pop("out_dir")
        return json.dumps(tree, sort_keys=True)

    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over everything that decides the result (``runtime`` does not)."""
        tree = json.loads(self.to_json())
        tree.pop("runtime")
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def check_compatible(config: RunConfig) -> None:
    """Reject pairs of settings that exclude each other, naming both.

    Raises:
        ConfigError: Two settings cannot be used together.
    """
    method, strategy = config.method, config.strategy
    if strategy.name in ("stack", "residual", "svd"):
        _require(
            method.sharing == "both",
            f"method.sharing={method.sharing} and strategy={strategy.name}: with one side shared the factor mean is "
            "already exact, use strategy=factor_mean",
        )
        _require(
            strategy.server_optimizer == "fedavg",
            f"strategy.server_optimizer={strategy.server_optimizer} and strategy={strategy.name}: server optimizers "
            "step on factors, use strategy=factor_mean",
        )
    optimizer = strategy.server_optimizer
    settable = {f.name for f in dataclasses.fields(SERVER_OPTIMIZERS[optimizer])}  # type: ignore[arg-type]
    _require(
        strategy.server_learning_rate == 0 or "learning_rate" in settable,
        f"strategy.server_learning_rate={strategy.server_learning_rate:g} and strategy.server_optimizer={optimizer}: "
        "the optimizer takes the mean as it is",
    )
    _require(
        strategy.server_momentum == -1 or not settable.isdisjoint({"momentum", "beta_1"}),
        f"strategy.server_momentum={strategy.server_momentum:g} and strategy.server_optimizer={optimizer}: "
        "the optimizer has no momentum",
    )
    if config.task.loss == "labels":
        _require(
            TASKS[config.task.name].kind != "instruction",
            f"task.loss=labels and task={config.task.name}: the task has no labels, use task.loss=vocabulary",
        )
    if config.selection == "best_validation":
        _require(
            config.task.validation_rows != -1,
            "selection=best_validation and task.validation_rows=-1: there are no validation rows to choose on",
        )
    if config.runtime.name == "deployment":
        _require(
            not config.baselines.centralised,
            "baselines.centralised=true and runtime=deployment: pooling the data needs one place that holds all of it",
        )


def run_config(tree: Mapping[str, Any]) -> RunConfig:
    """Check a composed tree against the dataclasses.

    Args:
        tree: Nested mappings, lists and scalars, as Hydra or JSON gives them.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: A key is unknown or missing, a value has the wrong type or range, or a pair is impossible.
    """
    return from_tree(RunConfig, tree, "")


def from_tree(cls: type[T], tree: Any, where: str) -> T:
    """Build a frozen dataclass from a mapping, naming the key, the expected and the given in every error.

    Raises:
        ConfigError: See :func:`run_config`.
    """
    label = where or "config"
    _require(isinstance(tree, Mapping), f"{label}: expected a mapping, got {tree!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        _require(key in known, f"{label}: unknown key {key!r}; known keys: {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()}
    missing = [
        name
        for name, spec in known.items()
        if name not in values
        and spec.default is dataclasses.MISSING
        and spec.default_factory is dataclasses.MISSING
    ]
    _require(not missing, f"{label}: missing {', '.join(missing)}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its annotation; lists become tuples, integers may stand for floats."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_tree(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        choices = typing.get_args(hint)
        _require(value in choices, f"{where}: expected one of {list(choices)}, got {value!r}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(
            next(a for a in typing.get_args(hint) if a is not types.NoneType), value, where
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    right = right and not (hint is float and not math.isfinite(value))
    _require(right, f"{where}: expected {hint.__name__}, got {value!r}")
    return value
