"""What stands beside the federated result: trivial predictors, zero-shot, local-only, centralised, and tuned rates."""

import dataclasses
import math

from fedllm_flwr.config import RunConfig
from fedllm_flwr.controls import control_baselines
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.journal import Journal
from fedllm_flwr.models.tokenizers import load_tokenizer
from fedllm_flwr.tasks.bag_of_words import majority, naive_bayes
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tasks.catalog import TASKS, load_task
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.tasks.metrics import accuracies
from fedllm_flwr.tasks.partitions import partition
from strategies import Hosting, RoundStrategy, build_strategy
from strategies.baselines import (
    Recorder,
    centralised,
    figures,
    local_only,
    local_tuning,
    plain_model,
    score,
    unfederated,
    zero_shot,
)
from strategies.rounds import TooFewRepliesError
from strategies.tally import client_figures


def task_kind(config: RunConfig) -> str:
    """``classification`` or ``instruction``; a user's own file decides it by its columns, a deployment by its loss."""
    kind = TASKS[config.task.name].kind
    if kind is None:
        by_loss = "classification" if config.task.loss == "labels" else "instruction"
        return by_loss if config.runtime.name == "deployment" else _task(config).kind
    return kind


def predictor_baselines(config: RunConfig, journal: Journal) -> None:
    """Majority class, bag of words, and the controls of the method and task, fitted on the clients' training rows.

    Nothing is added for tasks without labels, in a deployment (the rows are on the nodes), or on resume.
    """
    wanted = config.baselines.predictors and config.runtime.name != "deployment"
    if wanted:
        control_baselines(config, journal)
    missing = [n for n in ("majority", "bag_of_words") if not _has(journal, "baseline", n)]
    if not wanted or not missing or task_kind(config) != "classification":
        return
    task = _task(config)
    clients = partition(task, config.partition, config.rows_seed)
    train, validation = (
        [r for c in clients for r in getattr(c, split) if r.label is not None]  # a canary has none
        for split in ("train", "validation")
    )
    tests = [client.test for client in clients]
    for name, result in (
        ("majority", majority(train, tests)),
        ("bag_of_words", naive_bayes(train, validation, tests)),
    ):
        if name in missing:
            found = {
                "accuracy": result.overall.accuracy,
                **client_figures(accuracies(result.clients)),
            }
            journal.run.append({"kind": "baseline", "name": name, **found, "detail": result.detail})


def add_baselines(
    config: RunConfig, hosting: Hosting, journal: Journal, kind: str, names: tuple[str, ...]
) -> None:
    """Measure those of the named baselines that the configuration asks for and the run does not have yet."""
    for name in names:
        if not getattr(config.baselines, name) or _has(journal, "baseline", name):
            continue
        journal.note(f"baseline: {name}")
        recorder = Recorder(journal.note)
        if name == "zero_shot":
            found = zero_shot(config, hosting, recorder, kind, _templates(config, journal))
        elif name == "templates":
            _add_templates(config, hosting, journal, kind)
            continue
        else:
            rate = best_learning_rate(config, hosting, journal, name, kind)
            train = local_only if name == "local_only" else centralised
            train(unfederated(config, rate, config.num_rounds), hosting, recorder, kind, ("test",))
            found = {**figures(recorder.evaluations, "test", kind), "learning_rate": rate}
        journal.run.append({"kind": "baseline", "name": name, **found})


def _add_templates(config: RunConfig, hosting: Hosting, journal: Journal, kind: str) -> None:
    """The backbone under every hard prompt, one by one: no choice is made, so no validation rows are needed."""
    for template in _templates(config, journal):
        name = f"template_{template}"
        if not _has(journal, "baseline", name):
            found = plain_model(config, hosting, Recorder(journal.note), kind, template, "test")
            journal.run.append({"kind": "baseline", "name": name, **found})


def add_local_tuning(
    config: RunConfig, strategy: RoundStrategy, journal: Journal, kind: str
) -> None:
    """Measure the federated model after each client's own tuning, if it is asked for and not there yet."""
    name = "local_tuning"
    if not config.baselines.local_tuning or _has(journal, "baseline", name):
        return
    journal.note(f"baseline: {name}")
    rates = config.baselines.learning_rates or (config.optimizer.learning_rate,)
    found = local_tuning(strategy, Recorder(journal.note), kind, rates)
    journal.run.append({"kind": "baseline", "name": name, **found})


def best_learning_rate(
    config: RunConfig, hosting: Hosting, journal: Journal, name: str, kind: str
) -> float:
    """Try each of ``baselines.learning_rates`` for a few rounds and keep the best on validation rows.

    Every trial is kept in the run's records, so a resumed run does not repeat it.

    Returns:
        The best rate; the configured one when there is nothing to try.
    """
    rates = config.baselines.learning_rates
    if not rates:
        return config.optimizer.learning_rate
    tried = {
        t["learning_rate"]: -math.inf if t["score"] is None else t["score"]
        for t in journal.run.records("tuning")
        if t["name"] == name
    }
    for rate in rates:
        if rate not in tried:
            tried[rate] = _trial(config, hosting, journal, name, kind, rate)
            journal.run.append(
                {"kind": "tuning", "name": name, "learning_rate": rate, "score": tried[rate]}
            )
            journal.note(
                f"{name}: learning rate {rate:g} scores {tried[rate]:.3f} on validation rows"
            )
    best = max(rates, key=lambda rate: tried[rate])
    if tried[best] == -math.inf:
        journal.note(
            f"{name}: no learning rate has a figure on validation rows; {best:g} is the first"
        )
    return best


def _trial(
    config: RunConfig, hosting: Hosting, journal: Journal, name: str, kind: str, rate: float
) -> float:
    """How good a rate is on validation rows; one with which training breaks down is the worst of all."""
    rounds, rows = config.baselines.tuning_rounds, config.baselines.tuning_rows
    if rows:
        most = min(rows, config.partition.max_train_rows_per_client or rows)
        smaller = dataclasses.replace(config.partition, max_train_rows_per_client=most)
        config = dataclasses.replace(config, partition=smaller)
    recorder = Recorder(journal.note)
    short = unfederated(config, rate, rounds)
    try:
        if name == "local_only":
            local_only(short, hosting, recorder, kind, ("validation",))
        elif name == "centralised":
            centralised(short, hosting, recorder, kind, ("validation",))
        else:
            federated = dataclasses.replace(
                config, optimizer=short.optimizer, num_rounds=rounds, evaluate_every=rounds
            )
            strategy = build_strategy(federated, hosting, recorder, task_kind=kind)
            strategy.evaluated_splits = ("validation",)
            strategy.start(hosting.grid)
    except TooFewRepliesError as error:
        journal.note(f"{name}: learning rate {rate:g}: {error}")
        return -math.inf
    found = score(figures(recorder.evaluations, "validation", kind))
    return -math.inf if math.isnan(found) else found


def _task(config: RunConfig) -> Task:
    return load_task(config.task.options(config.runtime.data_path), config.rows_seed)


def _templates(config: RunConfig, journal: Journal) -> list[str]:
    """The prompts to try the plain model with: those of the task that fit; in a deployment the configured one."""
    if config.runtime.name == "deployment":
        return [config.task.template]
    task, runtime = _task(config), config.runtime
    tokenizer = load_tokenizer(config.model.ref(runtime.model_path), runtime.dtype)
    fitting = []
    for template in task.templates:
        try:
            build_encoder(task, tokenizer, template=template.name, loss=config.task.loss,
                          max_tokens=config.task.max_tokens)  # fmt: skip
            fitting.append(template.name)
        except ConfigError as error:
            journal.note(f"prompt {template.name} is left out: {error}")
    return fitting


def _has(journal: Journal, kind: str, name: str) -> bool:
    return any(record.get("name") == name for record in journal.run.records(kind))
