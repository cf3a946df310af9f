"""Which other settings differential privacy cannot bear."""

from typing import Protocol

from fedllm_flwr.settings.adaptation import ClientConfig
from fedllm_flwr.settings.federation import BaselinesConfig, FairnessConfig, StrategyConfig
from fedllm_flwr.settings.methods import (
    FedLoraConfig,
    FedPromptConfig,
    FedResPromptConfig,
    MethodConfig,
)
from fedllm_flwr.settings.privacy import CentralPrivacy, NoPrivacy, PrivacyConfig, SamplePrivacy
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.settings.tree import require
from fedllm_flwr.tasks.partitions import PartitionOptions


class Run(Protocol):
    """What of a run's configuration is looked at."""

    @property
    def method(self) -> MethodConfig: ...  # noqa: D102
    @property
    def strategy(self) -> StrategyConfig: ...  # noqa: D102
    @property
    def client(self) -> ClientConfig: ...  # noqa: D102
    @property
    def partition(self) -> PartitionOptions: ...  # noqa: D102
    @property
    def selection(self) -> str: ...  # noqa: D102
    @property
    def fairness(self) -> FairnessConfig: ...  # noqa: D102
    @property
    def privacy(self) -> PrivacyConfig: ...  # noqa: D102
    @property
    def baselines(self) -> BaselinesConfig: ...  # noqa: D102
    @property
    def runtime(self) -> RuntimeConfig: ...  # noqa: D102


def check_privacy(config: Run) -> None:
    """Refuse what the account does not hold, and what a noised mean cannot be made of.

    Raises:
        ConfigError: Two settings cannot be used together.
    """
    privacy, method, strategy = config.privacy, config.method, config.strategy
    if isinstance(privacy, NoPrivacy):
        return
    name = f"privacy={privacy.name}"
    require(
        not isinstance(method, FedResPromptConfig),
        f"{name} and method=fedresprompt: its exchanges of prompts and gradients are not covered, use "
        "method.noise_multiplier",
    )
    require(
        config.fairness.name == "none",
        f"{name} and fairness={config.fairness.name}: clients' sums by group carry no noise, use fairness=none",
    )
    require(
        not isinstance(method, FedPromptConfig) or method.cluster_length == 0,
        f"{name} and method.cluster_length > 0: which cluster a client is in carries no noise, use cluster_length=0",
    )
    require(
        not config.baselines.learning_rates,
        f"{name} and baselines.learning_rates: each trial would be a release that the account does not hold, set "
        "optimizer.learning_rate",
    )
    if isinstance(privacy, CentralPrivacy):
        _check_central(config, privacy)
        return
    if isinstance(privacy, SamplePrivacy):
        _check_samples(config)
        require(
            privacy.target_epsilon == 0 or config.runtime.name != "deployment",
            f"privacy.target_epsilon={privacy.target_epsilon:g}, privacy=sample and runtime=deployment: how many rows "
            "the nodes have is not known before, set privacy.noise_multiplier",
        )
    require(
        config.runtime.name != "deployment" or not config.baselines.local_only,
        f"baselines.local_only=true, {name} and runtime=deployment: each client would send an adapter that was "
        "trained without noise, use local_only=false",
    )
    for limit in ("epsilon_budget", "target_epsilon"):
        wanted = getattr(privacy, limit)
        require(
            wanted == 0 or strategy.max_retries == 0,
            f"privacy.{limit}={wanted:g}, {name} and strategy.max_retries={strategy.max_retries}: an answer that is "
            "asked for again is a second release, use max_retries=0",
        )


def _check_samples(config: Run) -> None:
    method = config.method
    require(
        config.client.clip_norm == 0,
        f"client.clip_norm={config.client.clip_norm:g} and privacy=sample: the gradient of each row is clipped "
        "instead, and noise is long, use client.clip_norm=0",
    )
    require(
        not isinstance(method, FedPromptConfig) or method.trainer == "gradient",
        "method.trainer=black_box and privacy=sample: a search has no gradients to clip, use trainer=gradient",
    )
    require(
        not isinstance(method, FedPromptConfig) or method.local_training == "joint",
        "method.local_training=alternating and privacy=sample: the account holds one training of a round, use joint",
    )


def _check_central(config: Run, privacy: CentralPrivacy) -> None:
    method, strategy = config.method, config.strategy
    require(
        strategy.weighting == "uniform",
        f"strategy.weighting={strategy.weighting} and privacy=central: one client may move the sum by a clip norm and "
        "no more, use weighting=uniform",
    )
    require(
        config.selection == "last",
        f"selection={config.selection} and privacy=central: the choice of a round reads clients' rows without noise, "
        "use selection=last",
    )
    if isinstance(method, FedLoraConfig):
        require(
            strategy.name == "factor_mean",
            f"strategy={strategy.name} and privacy=central: the noised mean of factors does not hold the mean of their "
            "products, use strategy=factor_mean, which is exact with method.sharing=b_only or alternating",
        )
        require(
            not method.client_ranks and not method.client_alphas,
            "method.client_ranks, method.client_alphas and privacy=central: a sum needs updates of one shape and "
            "scale, leave them empty",
        )
    if isinstance(method, FedPromptConfig):
        require(
            method.common_start,
            "method.common_start=false and privacy=central: the server clips what a client changed and must know "
            "where it began, use common_start=true",
        )
    clients = privacy.expected_clients(config.partition.num_clients, strategy.cohort_fraction)
    privacy.sum_noise(clients)
