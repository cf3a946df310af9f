"""Settings of means that a minority of lying clients can move only so far."""

from dataclasses import dataclass
from typing import Literal, Protocol

from fedllm_flwr.settings.federation import FairnessConfig, StrategyConfig, cohort_size
from fedllm_flwr.settings.methods import FedLoraConfig, FedPromptConfig, MethodConfig
from fedllm_flwr.settings.privacy import NoPrivacy, PrivacyConfig
from fedllm_flwr.settings.tree import require
from fedllm_flwr.settings.unlearning import UnlearningConfig
from fedllm_flwr.tasks.partitions import PartitionOptions

RULES = ("factor_mean", "prompt_mean")
"""Rules whose aggregate is a mean of equally shaped parts, which another mean can stand in for."""


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """Which mean of updates stands in for the plain one (``none`` keeps the plain one).

    ``norm_bound`` is read by ``norm_bound``, ``trimmed_fraction`` by ``trimmed_mean``, ``num_attackers`` by ``krum``
    and ``multi_krum``, ``num_chosen`` by ``multi_krum`` (0 = all but the attackers).
    """

    name: Literal["none", "norm_bound", "median", "trimmed_mean", "krum", "multi_krum"]
    norm_bound: float = 1.0
    trimmed_fraction: float = 0.2
    num_attackers: int = 1
    num_chosen: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.norm_bound > 0, f"robust.norm_bound: expected > 0, got {self.norm_bound:g}")
        require(
            0 <= self.trimmed_fraction < 0.5,
            f"robust.trimmed_fraction: expected in [0, 0.5), got {self.trimmed_fraction:g}",
        )
        for name in ("num_attackers", "num_chosen"):
            value = getattr(self, name)
            require(value >= 0, f"robust.{name}: expected >= 0, got {value}")

    def chosen_of(self, num_clients: int) -> int:
        """How many of so many updates Krum or Multi-Krum keeps."""
        return 1 if self.name == "krum" else self.num_chosen or num_clients - self.num_attackers


class Run(Protocol):
    """The settings of a run that a robust mean must agree with; see ``RunConfig``."""

    @property
    def partition(self) -> PartitionOptions: ...  # noqa: D102  # all of them as in RunConfig
    @property
    def method(self) -> MethodConfig: ...  # noqa: D102
    @property
    def strategy(self) -> StrategyConfig: ...  # noqa: D102
    @property
    def fairness(self) -> FairnessConfig: ...  # noqa: D102
    @property
    def privacy(self) -> PrivacyConfig: ...  # noqa: D102
    @property
    def unlearning(self) -> UnlearningConfig: ...  # noqa: D102
    @property
    def robust(self) -> RobustConfig: ...  # noqa: D102


def check_robust(run: Run) -> None:
    """Refuse what no robust mean can be made of, naming both settings.

    Raises:
        ConfigError: Two settings cannot be used together.
    """
    robust, method, strategy = run.robust, run.method, run.strategy
    if robust.name == "none":
        return
    name = f"robust={robust.name}"
    require(
        strategy.name in RULES,
        f"{name} and strategy={strategy.name}: expected a mean of equally shaped updates ({' or '.join(RULES)})",
    )
    require(
        strategy.weighting == "uniform",
        f"{name} and strategy.weighting={strategy.weighting}: a liar could claim any weight, use weighting=uniform",
    )
    require(
        run.fairness.name == "none",
        f"{name} and fairness={run.fairness.name}: a liar could claim any loss, use fairness=none",
    )
    require(
        isinstance(run.privacy, NoPrivacy),
        f"{name} and privacy={run.privacy.name}: the account is of another sum, use privacy=none",
    )
    require(
        run.unlearning.name == "none" and not run.unlearning.removed,
        f"{name} and unlearning={run.unlearning.name}: a client's part of such a mean is not its update, use "
        "unlearning=none",
    )
    if isinstance(method, FedLoraConfig):
        require(
            not method.client_ranks and not method.client_alphas,
            f"{name}, method.client_ranks and method.client_alphas: updates need one shape and scale, leave them empty",
        )
    if isinstance(method, FedPromptConfig):
        require(
            method.cluster_length == 0 and method.common_start,
            f"{name}: expected method.cluster_length=0 and method.common_start=true, so that all clients' updates are "
            "of the same values",
        )
    if robust.name in ("krum", "multi_krum"):
        _check_krum(run)


def _check_krum(run: Run) -> None:
    """Hold the smallest number of answers that a round accepts against what Krum needs."""
    robust, strategy = run.robust, run.strategy
    cohort = cohort_size(run.partition.num_clients, strategy.cohort_fraction)
    fewest = strategy.enough(cohort)
    needed = 2 * robust.num_attackers + 3
    require(
        fewest >= needed,
        f"robust={robust.name} and robust.num_attackers={robust.num_attackers}: expected rounds with at least {needed} "
        f"answers, got {fewest} (strategy.min_fraction={strategy.min_fraction:g} of {cohort} clients)",
    )
    require(
        robust.chosen_of(fewest) <= fewest - robust.num_attackers,
        f"robust.num_chosen: expected at most {fewest - robust.num_attackers}, the fewest answers less the attackers, "
        f"got {robust.num_chosen}",
    )
