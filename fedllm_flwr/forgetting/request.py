"""What is asked for when a client wants to be forgotten, and everything that can be wrong with it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import resumed_config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.journal import open_ledger
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.settings.unlearning import SIFT_MERGE
from fedllm_flwr.unlearning.ledger import Ledger
from fedllm_flwr.unlearning.removal import METHODS, Exactness, check_request, exactness_of
from strategies.observer import MERGING

NEEDS_LEDGER = ("merge", "replay", "rewind")
NEEDS_PLAIN_STEP = ("merge", "replay")


@dataclass(frozen=True)
class Request:
    """A removal that can be done.

    Attributes:
        source: The finished run; it is never written to.
        config: As the run was started.
        client: Whom to take out.
        method: How.
        exactness: What that promises.
        participation: The rounds in which each client's update was used.
        ledger: The updates, where the run kept them.
    """

    source: RunDirectory
    config: RunConfig
    client: int
    method: str
    exactness: Exactness
    participation: Mapping[int, tuple[int, ...]]
    ledger: Ledger | None

    @property
    def first_round(self) -> int:
        """The first round that the client had a part in."""
        return min(self.participation[self.client])

    def new_config(self) -> RunConfig:
        """The settings of the run without the client.

        Baselines that read all clients' rows are left out. A calibrated replay trains half as long as before.

        Raises:
            ConfigError: Nobody would be left.
        """
        config, unlearning, client = self.config, self.config.unlearning, self.config.client
        if self.method == "replay" and client.local_steps:
            client = dataclasses.replace(client, local_steps=max(1, client.local_steps // 2))
        elif self.method == "replay":
            client = dataclasses.replace(client, local_epochs=max(1, client.local_epochs // 2))
        return dataclasses.replace(
            config,
            client=client,
            unlearning=dataclasses.replace(
                unlearning,
                removed=tuple(sorted({*unlearning.removed, self.client})),
                removal=self.method,  # type: ignore[arg-type]  # checked against METHODS
                exactness=self.exactness,
            ),
            baselines=dataclasses.replace(
                config.baselines,
                predictors=False,
                local_only=False,
                centralised=False,
                learning_rates=(),
            ),
        )


def default_method(config: RunConfig) -> str:
    """The cheapest exact method that a run allows."""
    if config.strategy.name == SIFT_MERGE:
        return "exact_merge"
    if config.unlearning.name == "shards":
        return "shards"
    return "rewind" if config.unlearning.keeps_ledger else "retrain"


def read_request(
    source: RunDirectory, client: str, method: str, runtime: RuntimeConfig | None = None
) -> Request:
    """Check a request against the run that it is about; nothing is written.

    Args:
        source: The run.
        client: The client's number, as text.
        method: A key of ``METHODS``; empty = :func:`default_method`.
        runtime: Where to compute; None = as the run did.

    Raises:
        ConfigError: The run is not finished or keeps too little for the method; the client is unknown, never took part
            or was removed already; the method is unknown or does not fit the run.
        DataError: The ledger is damaged; names the file.
    """
    if not client.isdecimal():
        raise ConfigError(f"client: expected the number of a client, got {client!r}")
    if not source.is_finished:
        raise ConfigError(
            f"{source.path}: expected a finished run, got one that is not; fedllm action=resume run={source.path} goes "
            "on"
        )
    config = resumed_config(source, runtime)
    method = method or default_method(config)
    exactness = exactness_of(method, num_rounds=config.num_rounds)
    ledger = open_ledger(source)
    _check_method(source, config, method, ledger)
    number, participation = int(client), _participation(source, config, ledger)
    check_request(
        number,
        known=range(config.partition.num_clients),
        participated=participation,
        removed=config.unlearning.removed,
    )
    request = Request(source, config, number, method, exactness, participation, ledger)
    request.new_config()
    return request


def _check_method(
    source: RunDirectory, config: RunConfig, method: str, ledger: Ledger | None
) -> None:
    unlearning, strategy = config.unlearning, config.strategy
    if method in NEEDS_LEDGER and ledger is None:
        raise ConfigError(
            f"action=unlearn method={method}: expected a run with unlearning=ledger, got {source.path} with "
            f"unlearning={unlearning.name}; method=retrain needs no ledger"
        )
    if (method == "shards") != (unlearning.name == "shards") and method != "retrain":
        raise ConfigError(
            f"action=unlearn method={method} and unlearning={unlearning.name}: expected method=shards for a run with "
            "unlearning=shards and no other, or method=retrain"
        )
    is_sift = strategy.name == SIFT_MERGE
    if (method == "exact_merge" and not is_sift) or (is_sift and method in NEEDS_PLAIN_STEP):
        raise ConfigError(
            f"action=unlearn method={method} and strategy={strategy.name}: expected method=exact_merge for "
            f"strategy={SIFT_MERGE} and no other, or one of {', '.join(sorted(set(METHODS) - {'exact_merge', method}))}"
        )
    if method in NEEDS_PLAIN_STEP and strategy.server_optimizer != "fedavg":
        raise ConfigError(
            f"action=unlearn method={method} and strategy.server_optimizer={strategy.server_optimizer}: its moments "
            "hold the client too, use method=rewind"
        )
    if method in ("rewind", "merge", "replay") and unlearning.exactness in (
        "approximate",
        "rounding",
    ):
        raise ConfigError(
            f"action=unlearn method={method}: {source.path} was itself made by {unlearning.removal}, "
            f"{unlearning.exactness}, so its checkpoints still hold who was removed then; use method=retrain"
        )


def _participation(
    source: RunDirectory, config: RunConfig, ledger: Ledger | None
) -> dict[int, tuple[int, ...]]:
    """The rounds of each client, from what the run has kept of them."""
    if config.strategy.name == SIFT_MERGE:
        saved = checkpoints.latest(source.checkpoints)
        merged = saved.arrays.get(f"{MERGING}clients") if saved else None
        if merged is None:
            raise ConfigError(
                f"{source.path}: expected a whole checkpoint with the merge, got none"
            )
        return {int(client): (1,) for client in merged}
    if ledger is not None:
        return ledger.participation()  # of shards, the records tell: theirs are the whole run's too
    found: dict[int, tuple[int, ...]] = {}
    for record in source.records("client"):
        client = int(record["partition_id"])
        found[client] = (*found.get(client, ()), int(record["round"]))
    return found
