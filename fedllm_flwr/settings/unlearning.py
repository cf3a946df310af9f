"""Settings of unlearning: what a run keeps so that a client can be taken out, and whom it was taken out of already."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings import privacy_pairs
from fedllm_flwr.settings.methods import FedLoraConfig, FedPromptConfig
from fedllm_flwr.settings.tree import require
from fedllm_flwr.settings.wire import WireConfig
from fedllm_flwr.unlearning.removal import exactness_of
from fedllm_flwr.unlearning.signs import sign_vector

SIFT_MERGE = "sift_merge"
"""The strategy of sign-fixed clients that merge once."""

SERVED = "served/"
"""Prefix of the arrays of an evaluation message that are one client's own model under that strategy."""

PLAIN_RULES = ("factor_mean", "prompt_mean", SIFT_MERGE)
"""Rules whose next model is the mean of what clients end with, so that an update is a part of the model."""

Removal = Literal["none", "exact_merge", "shards", "rewind", "retrain", "merge", "replay"]


@dataclass(frozen=True, kw_only=True)
class UnlearningConfig:
    """What a run keeps of its clients' updates, and which clients are passed over.

    ``none`` keeps nothing; ``ledger`` keeps every update and every checkpoint; ``shards`` trains ``shards`` groups of
    clients apart and keeps a ledger of each. ``removed`` names clients that are passed over wherever they are drawn:
    a run with it is what a removal has to equal. ``removal`` and ``exactness`` are written by a removal: how the model
    was made, and what that promises. ``shadowed`` and ``shadow`` are written by a verification: in shadow model number
    ``shadow`` that client trains on a drawn half of all of its rows, held-out ones included.
    """

    name: Literal["none", "ledger", "shards"]
    retention: str = ""
    shards: int = 0
    removed: tuple[int, ...] = ()
    removal: Removal = "none"
    exactness: Literal["", "exact", "rounding", "approximate"] = ""
    shadowed: int = -1
    shadow: int = -1

    def __post_init__(self) -> None:
        """Check ranges, and that no setting is without effect."""
        require(
            (self.name != "none") == bool(self.retention.strip()),
            f"unlearning.retention: belongs to a ledger and is needed there, got name={self.name} "
            f"retention={self.retention!r}",
        )
        require(
            self.shards >= 2 if self.name == "shards" else self.shards == 0,
            f"unlearning.shards: expected at least 2 with unlearning=shards and 0 else, got {self.shards} with "
            f"unlearning={self.name}",
        )
        require(
            list(self.removed) == sorted(set(self.removed)) and min(self.removed, default=0) >= 0,
            f"unlearning.removed: expected different client numbers in rising order, got {list(self.removed)}",
        )
        require(
            self.removal == "none" or bool(self.removed),
            f"unlearning.removal={self.removal} and unlearning.removed=[]: nobody was removed, use none",
        )
        require(
            self.removal != "none" or not self.exactness,
            f"unlearning.exactness={self.exactness} and unlearning.removal=none: it is the promise of a removal, "
            "leave it empty",
        )
        require(
            (self.shadowed >= 0) == (self.shadow >= 0) and min(self.shadowed, self.shadow) >= -1,
            f"unlearning.shadowed={self.shadowed} and unlearning.shadow={self.shadow}: expected a client and the "
            "number of a shadow model, or -1 and -1",
        )
        require(
            self.shadowed not in self.removed,
            f"unlearning.shadowed={self.shadowed} and unlearning.removed={list(self.removed)}: nobody would train on "
            "the drawn half, name a client that stays",
        )

    @property
    def keeps_ledger(self) -> bool:
        """Whether updates and all checkpoints are kept."""
        return self.name != "none"


class Run(privacy_pairs.Run, Protocol):
    """The settings of a run that unlearning must agree with; see ``RunConfig``."""

    @property
    def num_rounds(self) -> int: ...  # noqa: D102  # all of them as in RunConfig
    @property
    def wire(self) -> WireConfig: ...  # noqa: D102
    @property
    def unlearning(self) -> UnlearningConfig: ...  # noqa: D102


def check_unlearning(run: Run) -> None:
    """Refuse what a client cannot be taken out of, naming both settings.

    Raises:
        ConfigError: Two settings cannot be used together.
    """
    unlearning = run.unlearning
    if run.strategy.name == SIFT_MERGE:
        _check_sift(run)
    if unlearning.keeps_ledger:
        _check_plain(run, f"unlearning={unlearning.name}")
    if unlearning.removed:
        _check_removed(run)
    require(
        unlearning.shadowed < run.partition.num_clients,
        f"unlearning.shadowed: expected one of the {run.partition.num_clients} clients, got {unlearning.shadowed}",
    )
    if unlearning.removal != "none":
        promised = exactness_of(unlearning.removal, num_rounds=run.num_rounds)
        require(
            unlearning.exactness == promised,
            f"unlearning.exactness: expected {promised}, what {unlearning.removal} promises, got "
            f"{unlearning.exactness!r}",
        )


def _check_plain(run: Run, name: str) -> None:
    """One update a client and round, of one size, that is a part of the mean."""
    method, strategy = run.method, run.strategy
    require(
        strategy.name in PLAIN_RULES,
        f"{name} and strategy={strategy.name}: what it merges is no sum of updates, use {', '.join(PLAIN_RULES)}",
    )
    require(
        run.wire.uplink == run.wire.downlink == "float32",
        f"{name}, wire.uplink={run.wire.uplink} and wire.downlink={run.wire.downlink}: an update is kept as the client "
        "made it, use float32",
    )
    require(
        run.privacy.name == "none",
        f"{name} and privacy={run.privacy.name}: updates would be kept without noise, and noise does not repeat "
        "itself, use privacy=none",
    )
    require(
        run.fairness.name != "q_ffl",
        f"{name} and fairness=q_ffl: it merges no mean, use another objective",
    )
    require(
        run.selection == "last",
        f"{name} and selection={run.selection}: the choice of a round reads every client's rows, use selection=last",
    )
    require(
        not run.baselines.learning_rates,
        f"{name} and baselines.learning_rates: the choice of a rate reads every client's rows, set "
        "optimizer.learning_rate",
    )
    if isinstance(method, FedLoraConfig):
        require(
            not method.client_ranks and not method.client_alphas,
            f"{name}, method.client_ranks and method.client_alphas: updates have one size and scale, leave them empty",
        )
        require(
            method.sharing != "alternating",
            f"{name} and method.sharing=alternating: updates are of one side, use both or b_only",
        )
    if isinstance(method, FedPromptConfig):
        for option, plain in (
            ("personal_length", 0),
            ("cluster_length", 0),
            ("common_start", True),
        ):
            require(
                getattr(method, option) == plain,
                f"{name} and method.{option}={getattr(method, option)}: what one part of the clients holds cannot be "
                f"taken back, use {plain}",
            )


def _check_sift(run: Run) -> None:
    name, method, strategy = f"strategy={SIFT_MERGE}", run.method, run.strategy
    _check_plain(run, name)
    require(
        run.num_rounds == 1 and strategy.cohort_fraction == 1,
        f"{name}, num_rounds={run.num_rounds} and strategy.cohort_fraction={strategy.cohort_fraction:g}: all clients "
        "merge once, use num_rounds=1 and cohort_fraction=1",
    )
    require(
        strategy.weighting == "uniform" and strategy.server_optimizer == "fedavg",
        f"{name}, strategy.weighting={strategy.weighting} and strategy.server_optimizer={strategy.server_optimizer}: "
        "the sum is over clients and divided by their number, use uniform and fedavg",
    )
    require(
        run.fairness.name == "none",
        f"{name} and fairness={run.fairness.name}: a client's update must not depend on the others, use none",
    )
    require(
        run.unlearning.name != "shards",
        f"{name} and unlearning=shards: a client can be taken out as it is, use ledger or none",
    )
    if isinstance(method, FedLoraConfig):
        require(
            method.sharing == "b_only",
            f"{name} and method.sharing={method.sharing}: signs on A and B do not fix the signs of B A, use b_only",
        )
    if isinstance(method, FedPromptConfig):
        require(
            method.kind == "soft" and method.trainer == "gradient",
            f"{name}, method.kind={method.kind} and method.trainer={method.trainer}: signs are fixed after each "
            "optimizer step on the prompt itself, use soft and gradient",
        )


def _check_removed(run: Run) -> None:
    removed, baselines, clients = run.unlearning.removed, run.baselines, run.partition.num_clients
    require(
        max(removed) < clients and len(removed) < clients,
        f"unlearning.removed: expected some of the {clients} clients, not all, got {list(removed)}",
    )
    for baseline in ("predictors", "local_only", "centralised", "learning_rates"):
        require(
            not getattr(baselines, baseline),
            f"unlearning.removed={list(removed)} and baselines.{baseline}: it would read the removed clients' rows, "
            "use baselines=none",
        )
    require(
        run.privacy.name == "none",
        f"unlearning.removed={list(removed)} and privacy={run.privacy.name}: the account is of all clients, use none",
    )


def run_signs(run_seed: int, size: int) -> np.ndarray:
    """The signs that the clients of a run share, int8 [size] of -1 and 1; nodes and server draw them alike."""
    return sign_vector(derive_seed(run_seed, "signs"), size)
