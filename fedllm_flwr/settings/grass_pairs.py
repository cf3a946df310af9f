"""Which other settings full-weight training cannot bear."""

from typing import Protocol

from fedllm_flwr.codecs import FLOAT_CODECS
from fedllm_flwr.settings.adaptation import ClientConfig, ModelConfig, OptimizerConfig
from fedllm_flwr.settings.federation import BaselinesConfig, FairnessConfig, StrategyConfig
from fedllm_flwr.settings.grass import FedGrassConfig
from fedllm_flwr.settings.methods import MethodConfig
from fedllm_flwr.settings.privacy import PrivacyConfig
from fedllm_flwr.settings.tree import require
from fedllm_flwr.settings.wire import WireConfig

ROW_CODECS = (*FLOAT_CODECS, "int8", "int4")
"""What changes of rows may travel as: nothing that a codec leaves out of them could be kept for other rows."""


class Run(Protocol):
    """What of a run's configuration is looked at."""

    @property
    def model(self) -> ModelConfig: ...  # noqa: D102
    @property
    def strategy(self) -> StrategyConfig: ...  # noqa: D102
    @property
    def client(self) -> ClientConfig: ...  # noqa: D102
    @property
    def method(self) -> MethodConfig: ...  # noqa: D102
    @property
    def optimizer(self) -> OptimizerConfig: ...  # noqa: D102
    @property
    def fairness(self) -> FairnessConfig: ...  # noqa: D102
    @property
    def privacy(self) -> PrivacyConfig: ...  # noqa: D102
    @property
    def wire(self) -> WireConfig: ...  # noqa: D102
    @property
    def baselines(self) -> BaselinesConfig: ...  # noqa: D102


def check_grass(run: Run) -> None:
    """Refuse what a mean of rows cannot be made of, naming both settings.

    Raises:
        ConfigError: Two settings cannot be used together.
    """
    method, strategy = "method=fedgrass", run.strategy
    require(
        run.model.quantization == "none",
        f"model.quantization={run.model.quantization} and {method}: it changes the weights themselves, use "
        "quantization=none, or method=fedlora",
    )
    require(
        strategy.name == "row_mean",
        f"strategy={strategy.name} and {method}: it averages something else, use strategy=row_mean",
    )
    require(
        strategy.server_optimizer == "fedavg",
        f"strategy.server_optimizer={strategy.server_optimizer} and {method}: the rows change from round to round, and "
        "moments would be of others, use server_optimizer=fedavg",
    )
    require(
        not (isinstance(run.method, FedGrassConfig) and run.method.eight_bit)
        or run.optimizer.name == "adamw",
        f"optimizer={run.optimizer.name} and method.eight_bit=true: expected optimizer=adamw",
    )
    for name in ("clip_norm", "proximal_mu"):
        value = getattr(run.client, name)
        require(
            value == 0,
            f"client.{name}={value:g} and {method}: no two layers' gradients are held at a time, use client.{name}=0",
        )
    require(
        run.fairness.name == "none",
        f"fairness={run.fairness.name} and {method}: rows of data are not weighed, use fairness=none",
    )
    if isinstance(run.method, FedGrassConfig):
        _check_protection(run.method, run.privacy.name)
    for direction in ("uplink", "downlink"):
        codec = getattr(run.wire, direction)
        require(
            codec in ROW_CODECS,
            f"wire.{direction}={codec} and {method}: the rows are the compression, and what it leaves out of them "
            f"would be lost, use {', '.join(ROW_CODECS)}",
        )
    require(
        not run.wire.error_feedback,
        f"wire.error_feedback=true and {method}: what was left out of some rows has no place in the next ones, use "
        "error_feedback=false",
    )
    require(
        not run.baselines.local_tuning,
        f"baselines.local_tuning=true and {method}: tuning trains an adapter, use local_only",
    )


def _check_protection(method: FedGrassConfig, privacy: str) -> None:
    """Noise goes on values of rows, so which rows they are must not depend on anybody's data."""
    if privacy == "none":
        return
    name = f"privacy={privacy}"
    require(
        privacy != "sample",
        f"{name} and method=fedgrass: gradients of single rows of data are never formed, and so cannot be clipped, use "
        "method=fedlora",
    )
    require(
        method.trainer != "grass" or not method.reads_norms,
        f"{name} and method.rule={method.rule}: rows that are picked by gradients tell of the data, use "
        "method.rule=uniform_nr",
    )
    require(
        privacy != "central" or not method.picks_at_clients,
        f"{name} and method.sharing=local: which rows a sum has tells who took part, use method.sharing=shared",
    )
