"""Settings of the server's side: cohorts and merging, fairness over groups, and the baselines."""

import math
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.averaging import SERVER_OPTIMIZERS
from fedllm_flwr.settings.tree import require

Objective = Literal["none", "group_dro", "agnostic", "bounded_loss", "accuracy_gap", "q_ffl"]
Groups = Literal["none", "data", "label", "client", "inferred", "random"]


def cohort_size(num_clients: int, fraction: float) -> int:
    """Clients of a cohort that is a fraction of all: the nearest whole number, at least one."""
    return max(1, math.floor(fraction * num_clients + 0.5))


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Who trains in a round, how replies merge, and what is done when some of them fail."""

    name: Literal[
        "factor_mean",
        "stack",
        "residual",
        "svd",
        "prompt_mean",
        "controller_mean",
        "row_mean",
        "sift_merge",
    ]
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
        require(
            self.server_optimizer in SERVER_OPTIMIZERS,
            f"strategy.server_optimizer: expected one of {sorted(SERVER_OPTIMIZERS)}, got {self.server_optimizer!r}",
        )
        for name in ("cohort_fraction", "min_fraction"):
            value = getattr(self, name)
            require(0 < value <= 1, f"strategy.{name}: expected in (0, 1], got {value}")
        require(
            self.max_retries >= 0, f"strategy.max_retries: expected >= 0, got {self.max_retries}"
        )
        require(
            self.round_timeout_seconds > 0,
            f"strategy.round_timeout_seconds: expected > 0, got {self.round_timeout_seconds}",
        )
        require(
            self.server_learning_rate >= 0,
            f"strategy.server_learning_rate: expected >= 0 (0 = its default), got {self.server_learning_rate}",
        )
        require(
            self.server_momentum == -1 or 0 <= self.server_momentum < 1,
            f"strategy.server_momentum: expected in [0, 1) (-1 = the optimizer's default), got {self.server_momentum}",
        )

    def enough(self, clients: int) -> int:
        """How many of so many clients must give a good reply."""
        return math.ceil(self.min_fraction * clients)


@dataclass(frozen=True, kw_only=True)
class FairnessConfig:
    """Over which groups of rows a run is fair, and in what sense.

    ``groups`` says what a row's group is: the data's own (``data``), its label, its client, label and an attribute
    that the model infers (``inferred``), or chance (``random``, a control). With ``name=none`` they are only reported.
    """

    name: Objective
    groups: Groups = "none"
    step_size: float = 0.1
    bound: float = 0.0
    max_gap: float = 0.1
    max_multiplier: float = 10.0
    q: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges, and that an objective over groups has groups."""
        for name in ("step_size", "max_multiplier"):
            require(
                getattr(self, name) > 0, f"fairness.{name}: expected > 0, got {getattr(self, name)}"
            )
        for name in ("bound", "q"):
            require(
                getattr(self, name) >= 0,
                f"fairness.{name}: expected >= 0, got {getattr(self, name)}",
            )
        require(0 <= self.max_gap < 1, f"fairness.max_gap: expected in [0, 1), got {self.max_gap}")
        require(
            self.groups != "none" or self.name in ("none", "q_ffl"),
            f"fairness={self.name} and fairness.groups=none: expected groups to be fair over (data, label, client, "
            "inferred or random)",
        )
        require(
            self.name != "bounded_loss" or self.bound > 0,
            f"fairness.bound: expected the loss in nats that no group may exceed, > 0, got {self.bound}",
        )


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """What is measured beside the federated result; ``learning_rates`` are tried on validation rows.

    A trial takes ``tuning_rounds`` rounds over at most ``tuning_rows`` training rows of each client (0 = all); a
    method with much data can so be given its rate at a fraction of the run's own cost.
    """

    name: str
    predictors: bool = True
    zero_shot: bool = True
    templates: bool = False
    local_only: bool = False
    centralised: bool = False
    local_tuning: bool = False
    learning_rates: tuple[float, ...] = ()
    tuning_rounds: int = 1
    tuning_rows: int = 0
    local_tuning_steps: int = 10

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            all(rate > 0 for rate in self.learning_rates),
            "baselines.learning_rates: expected all > 0",
        )
        require(
            self.tuning_rounds >= 1,
            f"baselines.tuning_rounds: expected >= 1, got {self.tuning_rounds}",
        )
        require(
            self.tuning_rows >= 0,
            f"baselines.tuning_rows: expected >= 0, got {self.tuning_rows}",
        )
        require(
            self.local_tuning_steps >= 1,
            f"baselines.local_tuning_steps: expected >= 1, got {self.local_tuning_steps}",
        )
