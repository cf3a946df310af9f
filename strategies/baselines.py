"""Baselines that run through the same messages as the method: plain model, local-only, centralised, locally tuned.

Local-only and centralised train for as many rounds of the same local work as the method, with the optimizer's state
starting anew each round, so that the only difference is what is shared. Each takes its own learning rate.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from flwr.app import ConfigRecord, Message

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.settings.methods import FedLoraConfig, FedPromptConfig, FedResPromptConfig
from fedllm_flwr.settings.privacy import NoPrivacy
from fedllm_flwr.settings.robust import RobustConfig
from fedllm_flwr.settings.unlearning import UnlearningConfig
from fedllm_flwr.settings.wire import WireConfig
from fedllm_flwr.unlearning.ledger import Contribution
from strategies import build_strategy
from strategies.exchange import stream
from strategies.hosting import Hosting
from strategies.rounds import RoundStrategy
from strategies.tally import SplitTally

PLAIN_MEANS: dict[str, Literal["factor_mean", "prompt_mean", "controller_mean", "row_mean"]] = {
    "fedlora": "factor_mean",
    "fedprompt": "prompt_mean",
    "fedresprompt": "controller_mean",
    "fedgrass": "row_mean",
}
"""Method name -> the strategy under which a client that is alone goes on from its own result."""


class Recorder:
    """An observer that keeps the latest evaluations and nothing else: baselines are not part of the method's bytes."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.evaluations: list[dict[str, Any]] = []
        self._note = note

    def count(self, kind: str, direction: str, message: Message) -> None:
        """Not counted."""

    def started(self, server_round: int, cohort: Sequence[int]) -> None:
        """Not kept."""

    def client(self, record: dict[str, Any]) -> None:
        """Not kept."""

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """A baseline that loses a client says so."""
        self._note(f"baseline, round {server_round}: client {partition_id} is left out: {reason}")

    def evaluated(self, record: dict[str, Any]) -> None:
        """Keep the evaluations of the latest round."""
        self.evaluations = [e for e in self.evaluations if e["round"] == record["round"]] + [record]

    def contributed(self, server_round: int, contribution: Contribution) -> None:
        """Not kept."""

    def kept(self, kind: str) -> Sequence[dict[str, Any]]:
        """Nothing is kept."""
        return ()

    def finished(self, record: dict[str, Any], checkpoint: object) -> None:
        """Not kept."""


def figures(evaluations: Iterable[Mapping[str, Any]], split: str, kind: str) -> dict[str, float]:
    """The figures of one split, over rows, clients and groups."""
    tally = SplitTally()
    for sums in evaluations:
        if sums.get("split") != split:  # a multiplier has none
            continue
        if sums["kind"] == "group":
            tally.groups[sums["group"]].add(sums)
        else:
            tally.add(sums, {})
    return tally.figures(kind)


def score(found: Mapping[str, float]) -> float:
    """Higher is better: accuracy, or minus the loss where there are no labels."""
    return found["accuracy"] if "accuracy" in found else -found.get("loss", math.inf)


def unfederated(config: RunConfig, learning_rate: float, num_rounds: int) -> RunConfig:
    """The same local work with nothing merged: every client (or the pool) goes on from its own adapter.

    A prompt has as many tokens as the method's, all of one kind: where nothing is shared, all of it is personal. A
    controller is averaged with none, so nothing of it has to be kept from the others.
    """
    method, client = config.method, config.client
    if isinstance(method, FedPromptConfig):
        if method.local_training == "alternating":  # which does the local work twice
            client = dataclasses.replace(
                client, local_epochs=2 * client.local_epochs, local_steps=2 * client.local_steps
            )
        method = dataclasses.replace(
            method, length=method.spec().length, personal_length=0, cluster_length=0,
            local_training="joint", common_start=True,
        )  # fmt: skip
    elif isinstance(method, FedResPromptConfig):
        method = dataclasses.replace(method, mode="fedavg_controller")
    elif isinstance(method, FedLoraConfig):
        method = dataclasses.replace(method, sharing="both")
    return dataclasses.replace(
        config,
        strategy=dataclasses.replace(
            config.strategy,
            name=PLAIN_MEANS[method.name],
            server_optimizer="fedavg",
            server_learning_rate=0.0,
            server_momentum=-1.0,
            cohort_fraction=1.0,
        ),
        method=method,
        client=client,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=learning_rate),
        wire=WireConfig(name="float32"),
        fairness=dataclasses.replace(config.fairness, name="none"),
        privacy=NoPrivacy(name="none"),
        robust=RobustConfig(name="none"),
        unlearning=UnlearningConfig(name="none"),
        num_rounds=num_rounds,
        evaluate_every=num_rounds,
    )


def plain_model(
    config: RunConfig, hosting: Hosting, recorder: Recorder, kind: str, template: str, split: str
) -> dict[str, float]:
    """The figures of the backbone alone under a template, on one split."""
    strategy = build_strategy(config, hosting, recorder, task_kind=kind)
    strategy.plain, strategy.template, strategy.evaluated_splits = True, template, (split,)
    recorder.evaluations = []
    _evaluate([strategy], config, hosting, 0)
    return figures(recorder.evaluations, split, kind)


def zero_shot(
    config: RunConfig, hosting: Hosting, recorder: Recorder, kind: str, templates: Sequence[str]
) -> dict[str, Any]:
    """Evaluate the plain backbone under each template; the one that is best on validation rows is tested.

    Returns:
        Figures of the test rows, and ``detail`` that names the template and says how it was chosen.
    """
    scores = {
        template: score(plain_model(config, hosting, recorder, kind, template, "validation"))
        for template in (templates if len(templates) > 1 else ())
    }
    best, how = templates[0], "the only one"
    if any(value > -math.inf for value in scores.values()):
        best = max(scores, key=lambda name: scores[name])
        how = f"the best of {len(scores)} on validation rows"
    elif scores:
        how = f"the first of {len(scores)}: no validation rows to choose on"
    found = plain_model(config, hosting, recorder, kind, best, "test")
    return {**found, "detail": f"template {best or 'by default'}, {how}"}


def local_tuning(
    strategy: RoundStrategy, recorder: Recorder, kind: str, rates: Sequence[float]
) -> dict[str, Any]:
    """The federated model, tuned by each client for some steps on its own rows, and measured on its own.

    Returns:
        Figures of the test rows, with the rate that is best on validation rows.
    """
    config, before = strategy.config, strategy.observer
    steps = config.baselines.local_tuning_steps
    strategy.observer = recorder

    def tuned(rate: float, split: str) -> dict[str, float]:
        strategy.tuning = {"tune-steps": steps, "learning-rate": rate}
        strategy.evaluated_splits, recorder.evaluations = (split,), []
        _evaluate([strategy], config, strategy.hosting, config.num_rounds)
        return figures(recorder.evaluations, split, kind)

    splits = strategy.evaluated_splits
    try:
        best = (
            max(rates, key=lambda rate: score(tuned(rate, "validation")))
            if len(rates) > 1
            else rates[0]
        )
        found = tuned(best, "test")
    finally:
        strategy.observer, strategy.tuning, strategy.evaluated_splits = before, {}, splits
    return {**found, "learning_rate": best, "detail": f"{steps} steps of each client's own"}


def centralised(
    config: RunConfig, hosting: Hosting, recorder: Recorder, kind: str, splits: tuple[str, ...]
) -> None:
    """Train one adapter on all clients' rows together; the recorder has its evaluations afterwards."""
    strategy = build_strategy(
        config, hosting, recorder, partition_ids=[records.POOLED], task_kind=kind
    )
    strategy.evaluated_splits = ()
    strategy.start(hosting.grid)
    strategy.evaluated_splits, strategy.evaluated_ids = (
        splits,
        list(range(config.partition.num_clients)),
    )
    _evaluate([strategy], config, hosting, config.num_rounds)


def local_only(
    config: RunConfig, hosting: Hosting, recorder: Recorder, kind: str, splits: tuple[str, ...]
) -> None:
    """Train one adapter per client on its own rows; each is evaluated on its own client's rows only."""
    clients = range(config.partition.num_clients)
    alone = [
        build_strategy(config, hosting, recorder, partition_ids=[p], task_kind=kind)
        for p in clients
    ]
    for server_round in range(1, config.num_rounds + 1):
        asked = {
            s: s.configure_train(server_round, s.arrays(), ConfigRecord(), hosting.grid)
            for s in alone
        }
        for strategy, replies in _exchange(asked, config, hosting, recorder):
            strategy.aggregate_train(server_round, replies)
    for strategy in alone:
        strategy.evaluated_splits = splits
    _evaluate(alone, config, hosting, config.num_rounds)


def _evaluate(
    strategies: Sequence[RoundStrategy], config: RunConfig, hosting: Hosting, server_round: int
) -> None:
    asked = {
        s: s.configure_evaluate(server_round, s.arrays(), ConfigRecord(), hosting.grid)
        for s in strategies
    }
    for strategy, replies in _exchange(asked, config, hosting, strategies[0].observer):
        strategy.aggregate_evaluate(server_round, replies)


def _exchange(
    asked: Mapping[RoundStrategy, list[Message]], config: RunConfig, hosting: Hosting, observer: Any
) -> list[tuple[RoundStrategy, list[Message]]]:
    """One exchange of several strategies at once, so that all nodes have work."""
    together = [message for messages in asked.values() for message in messages]
    found = stream(hosting.grid, together, config.strategy.round_timeout_seconds, observer.count)
    replies = {reply.metadata.reply_to_message_id: reply for reply in found}
    return [
        (
            strategy,
            [replies[m.metadata.message_id] for m in messages if m.metadata.message_id in replies],
        )
        for strategy, messages in asked.items()
    ]
