"""The typed configuration of a run, and the one place where impossible settings fail.

Hydra composes plain YAML; :func:`run_config` turns the result into frozen dataclasses and checks every type,
range and pair before anything loads. The same function reads the JSON that travels in each message, so a node
needs no Hydra. ``runtime`` and ``out_dir`` say where and how a run executes, not what it computes: they are
outside the fingerprint.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedllm_flwr.averaging import SERVER_OPTIMIZERS
from fedllm_flwr.settings.adaptation import ClientConfig, ModelConfig, OptimizerConfig, TaskConfig
from fedllm_flwr.settings.federation import (
    BaselinesConfig,
    FairnessConfig,
    StrategyConfig,
)
from fedllm_flwr.settings.grass import FedGrassConfig
from fedllm_flwr.settings.grass_pairs import check_grass
from fedllm_flwr.settings.methods import (
    FedLoraConfig,
    FedPromptConfig,
    FedResPromptConfig,
    MethodConfig,
)
from fedllm_flwr.settings.privacy import PrivacyConfig
from fedllm_flwr.settings.privacy_pairs import check_privacy
from fedllm_flwr.settings.robust import RobustConfig, check_robust
from fedllm_flwr.settings.runtime import (
    NODE_LOCAL_FIELDS,
    RuntimeConfig,
)
from fedllm_flwr.settings.tree import from_tree, require
from fedllm_flwr.settings.unlearning import UnlearningConfig, check_unlearning
from fedllm_flwr.settings.wire import WireConfig, check_wire
from fedllm_flwr.tasks.catalog import TASKS
from fedllm_flwr.tasks.partitions import PartitionOptions


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole."""

    experiment: str
    seed: int
    data_seed: int = -1
    num_rounds: int
    evaluate_every: int = 1
    selection: Literal["last", "best_validation"] = "last"
    keep_checkpoints: int = 3
    model: ModelConfig
    task: TaskConfig
    partition: PartitionOptions
    method: MethodConfig
    optimizer: OptimizerConfig
    client: ClientConfig
    strategy: StrategyConfig
    wire: WireConfig
    fairness: FairnessConfig
    privacy: PrivacyConfig
    robust: RobustConfig
    unlearning: UnlearningConfig
    baselines: BaselinesConfig
    runtime: RuntimeConfig
    out_dir: str = field(default="")

    def __post_init__(self) -> None:
        """Check ranges and the pairs that cannot work together."""
        require(self.num_rounds >= 1, f"num_rounds: expected >= 1, got {self.num_rounds}")
        require(
            self.evaluate_every >= 1, f"evaluate_every: expected >= 1, got {self.evaluate_every}"
        )
        require(
            self.keep_checkpoints >= 1,
            f"keep_checkpoints: expected >= 1, got {self.keep_checkpoints}",
        )
        require(
            self.partition.num_clients >= 1,
            f"partition.num_clients: expected >= 1, got {self.partition.num_clients}",
        )
        require(self.seed >= 0, f"seed: expected >= 0, got {self.seed}")
        require(self.data_seed >= -1, f"data_seed: expected >= -1, got {self.data_seed}")
        check_compatible(self)

    @property
    def rows_seed(self) -> int:
        """Root of the draws that make rows and deal them to clients; all other draws are of ``seed``."""
        return self.seed if self.data_seed == -1 else self.data_seed

    @property
    def kept_checkpoints(self) -> int:
        """Newest checkpoints that stay: all of them where a client may have to be taken out from its first round on."""
        return self.num_rounds + 1 if self.unlearning.keeps_ledger else self.keep_checkpoints

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
    strategy = config.strategy
    if isinstance(config.method, FedLoraConfig):
        _check_lora(config, config.method)
    elif isinstance(config.method, FedPromptConfig):
        _check_prompts(config, config.method)
    elif isinstance(config.method, FedGrassConfig):
        check_grass(config)
    else:
        _check_reservoirs(config, config.method)
    check_privacy(config)
    check_wire(config.wire, config.method, strategy.name)
    check_unlearning(config)
    check_robust(config)
    optimizer = strategy.server_optimizer
    settable = {f.name for f in dataclasses.fields(SERVER_OPTIMIZERS[optimizer])}  # type: ignore[arg-type]
    require(
        strategy.server_learning_rate == 0 or "learning_rate" in settable,
        f"strategy.server_learning_rate={strategy.server_learning_rate:g} and strategy.server_optimizer={optimizer}: "
        "the optimizer takes the mean as it is",
    )
    require(
        strategy.server_momentum == -1 or not settable.isdisjoint({"momentum", "beta_1"}),
        f"strategy.server_momentum={strategy.server_momentum:g} and strategy.server_optimizer={optimizer}: "
        "the optimizer has no momentum",
    )
    if config.task.loss == "labels":
        require(
            TASKS[config.task.name].kind != "instruction",
            f"task.loss=labels and task={config.task.name}: the task has no labels, use task.loss=vocabulary",
        )
    if config.task.canaries:
        require(
            config.task.loss == "vocabulary",
            f"task.canaries={config.task.canaries} and task.loss=labels: a secret is no label, use vocabulary",
        )
        require(
            config.fairness.groups not in ("label", "inferred"),
            f"task.canaries={config.task.canaries} and fairness.groups={config.fairness.groups}: the groups' names "
            "would be secrets, use other groups or none",
        )
    if config.selection == "best_validation":
        require(
            config.task.validation_rows != -1,
            "selection=best_validation and task.validation_rows=-1: there are no validation rows to choose on",
        )
    require(
        len(config.baselines.learning_rates) < 2 or config.task.validation_rows != -1,
        "baselines.learning_rates and task.validation_rows=-1: there are no validation rows to choose a rate on",
    )
    require(
        strategy.weighting == "examples" or config.fairness.name in ("none", "q_ffl"),
        f"strategy.weighting={strategy.weighting} and fairness={config.fairness.name}: the objective weighs rows, "
        "and so clients by their examples, use weighting=examples",
    )
    if config.partition.name == "site":
        _check_sites(config)
    if config.runtime.name == "deployment":
        require(
            not config.baselines.centralised,
            "baselines.centralised=true and runtime=deployment: pooling the data needs one place that holds all of it",
        )


def _check_sites(config: "RunConfig") -> None:
    task = config.task
    require(
        config.runtime.name == "deployment",
        f"partition=site and runtime={config.runtime.name}: all clients would have the same rows, use "
        "runtime=deployment or another partition",
    )
    require(
        TASKS[task.name].kind is None,
        f"partition=site and task={task.name}: every node would have the same rows, use a task of the nodes' own files",
    )
    require(
        bool(task.labels) or task.loss == "vocabulary",
        "partition=site and task.labels=[]: a node's file may lack some labels, name all of them in one order",
    )


def _check_lora(config: "RunConfig", method: FedLoraConfig) -> None:
    strategy = config.strategy
    require(
        strategy.name not in ("prompt_mean", "controller_mean", "row_mean"),
        f"strategy={strategy.name} and method=fedlora: expected factor_mean, stack, residual or svd",
    )
    if strategy.name not in ("factor_mean", "sift_merge"):
        require(
            method.sharing == "both",
            f"method.sharing={method.sharing} and strategy={strategy.name}: with one side shared the factor mean is "
            "already exact, use strategy=factor_mean",
        )
        require(
            strategy.server_optimizer == "fedavg",
            f"strategy.server_optimizer={strategy.server_optimizer} and strategy={strategy.name}: server optimizers "
            "step on factors, use strategy=factor_mean",
        )
    require(
        config.fairness.name != "q_ffl",
        "fairness=q_ffl and method=fedlora: q-FFL merges plain updates, use method=fedprompt",
    )


def _check_prompts(config: "RunConfig", method: FedPromptConfig) -> None:
    strategy = config.strategy
    searches = method.trainer == "black_box"
    require(
        not searches or not config.baselines.learning_rates,
        "baselines.learning_rates and method.trainer=black_box: a search has no learning rate",
    )
    require(
        not searches or not config.baselines.local_tuning,
        "baselines.local_tuning=true and method.trainer=black_box: tuning takes gradients",
    )
    require(
        config.runtime.name != "deployment"
        or method.placement == "before"
        or TASKS[config.task.name].kind is not None,
        f"method.placement=after, runtime=deployment and task={config.task.name}: the server does not know the text of "
        "the nodes' own files that the prompt stands behind, use placement=before",
    )
    require(
        config.selection == "last" or method.personal_length == 0,
        f"selection={config.selection} and method.personal_length={method.personal_length}: the server cannot bring "
        "back an earlier round's personal prompts, use selection=last",
    )
    require(
        strategy.name in ("prompt_mean", "sift_merge"),
        f"strategy={strategy.name} and method=fedprompt: it averages something else, use strategy=prompt_mean",
    )
    if config.fairness.name == "q_ffl":
        require(
            strategy.server_optimizer == "fedavg",
            f"fairness=q_ffl and strategy.server_optimizer={strategy.server_optimizer}: q-FFL makes the server's "
            "step itself, use server_optimizer=fedavg",
        )
        require(
            method.cluster_length == 0,
            "fairness=q_ffl and method.cluster_length > 0: q-FFL merges one shared prompt",
        )
        require(
            config.client.schedule == "constant" or config.client.minimum_fraction > 0,
            f"fairness=q_ffl, client.schedule={config.client.schedule} and client.minimum_fraction=0: the last round's "
            "learning rate is 0, and q-FFL takes its inverse, use minimum_fraction > 0",
        )
    require(
        method.trainer == "gradient" or config.fairness.name == "none",
        f"fairness={config.fairness.name} and method.trainer=black_box: queries give no weighted gradient",
    )
    require(
        method.trainer == "gradient" or config.client.proximal_mu == 0,
        "client.proximal_mu and method.trainer=black_box: the search has no proximal term",
    )


def _check_reservoirs(config: "RunConfig", method: FedResPromptConfig) -> None:
    strategy, client, task = config.strategy, config.client, config.task
    require(
        strategy.name == "controller_mean",
        f"strategy={strategy.name} and method=fedresprompt: it averages something else, use strategy=controller_mean",
    )
    require(
        method.mode != "sync_sgd" or strategy.server_optimizer == "fedavg",
        f"strategy.server_optimizer={strategy.server_optimizer} and method.mode=sync_sgd: the server makes the "
        "clients' own optimizer's steps, use server_optimizer=fedavg",
    )
    require(
        method.mode != "private_controller" or config.selection == "last",
        f"selection={config.selection} and method.mode=private_controller: the server cannot bring back an earlier "
        "round's private matrices, use selection=last",
    )
    require(
        task.loss == "labels",
        f"task.loss={task.loss} and method=fedresprompt: prompts are scored over the label words, use task.loss=labels",
    )
    for option, chosen in (("name", config.fairness.name), ("groups", config.fairness.groups)):
        require(
            chosen == "none",
            f"fairness.{option}={chosen} and method=fedresprompt: rows are not weighed or grouped, use none",
        )
    for option, value, plain in (
        ("proximal_mu", client.proximal_mu, 0),
        ("gradient_accumulation", client.gradient_accumulation, 1),
    ):
        require(
            value == plain,
            f"client.{option}={value:g} and method=fedresprompt: a step is one exchange, use {plain}",
        )
    for baseline in ("zero_shot", "templates", "local_tuning"):
        require(
            not getattr(config.baselines, baseline),
            f"baselines.{baseline}=true and method=fedresprompt: the model is at the server and reads prompts, measure "
            "it with method=fedprompt",
        )
    require(
        config.runtime.name != "deployment" or TASKS[task.name].kind is not None,
        f"runtime=deployment, task={task.name} and method=fedresprompt: the server scores label words and cannot read "
        "the nodes' files, use a task of the catalog",
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
