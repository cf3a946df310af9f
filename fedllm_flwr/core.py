"""The core behind every door: ``run(grid, config, out_dir)`` runs or resumes an experiment into a run directory."""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.comparison import (
    add_baselines,
    add_local_tuning,
    best_learning_rate,
    predictor_baselines,
    task_kind,
)
from fedllm_flwr.config import RunConfig, run_config
from fedllm_flwr.errors import ConfigError, FedLLMError, RunStoppedError
from fedllm_flwr.exporting import export
from fedllm_flwr.journal import Journal
from fedllm_flwr.limits import BoundedGrid
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.environment import environment
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.runs.report import write_report
from fedllm_flwr.runs.tensorboard import write_tensorboard
from fedllm_flwr.runs.tracking import Untracked, mlflow_client, tracker_of
from fedllm_flwr.runs.writer import only_writer
from fedllm_flwr.settings.privacy import NoPrivacy
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.sharding import train_shards
from strategies import Hosting, RoundStrategy, build_strategy
from strategies.observer import Checkpointed
from strategies.private import privacy_notes


def default_out_dir(config: RunConfig) -> str:
    """``outputs/<experiment>/<time>`` below the working directory."""
    return str(Path("outputs") / config.experiment / time.strftime("%Y-%m-%d_%H-%M-%S"))


def run(grid: Grid, config: RunConfig, out_dir: str | Path) -> dict[str, Any]:
    """Run an experiment, or go on with it if the run directory holds a part of it.

    Args:
        grid: Flower's transport, with or without nodes yet.
        config: The run.
        out_dir: The run directory; created if absent.

    Returns:
        The summary.

    Raises:
        ConfigError: The folder holds a run of another configuration, or MLflow is asked for and is not there.
        RunStoppedError: The run gave up; the same call goes on from its last checkpoint.
    """
    quiet_flower(config.runtime.verbose)
    if config.runtime.mlflow:
        mlflow_client()  # or nothing is written
    directory = open_or_create(config, Path(out_dir))
    with only_writer(directory), Progress() as progress:
        journal = Journal(directory, config, progress)
        tracker = tracker_of(config.runtime.mlflow, directory, journal.note)
        journal.after_round = tracker.update
        bounded = BoundedGrid(grid, config.runtime.max_message_mb)
        hosting = Hosting(bounded, config.runtime.node_wait_seconds, journal.note, journal.count)
        saved = checkpoints.latest(directory.checkpoints, journal.note)
        journal.resume(saved.server_round if saved else -1)
        try:
            clients = range(config.partition.num_clients if saved else 0)  # none: all nodes
            hosting.refresh(clients, config.strategy.enough(len(clients)))
            if config.unlearning.shards and saved is None:
                again = partial(run, grid)
                train_shards(config, directory, hosting, again, task_kind(config))
                saved = checkpoints.latest(directory.checkpoints, journal.note)
            summary = _run(config, hosting, journal, saved)
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide why the run stopped
                if isinstance(error, Exception):
                    said = error if isinstance(error, FedLLMError) else repr(error)
                    journal.note(f"stopped: {said}")
                _write_views(directory, tracker)
            raise
        _write_views(directory, tracker)
        progress.finished(summary)
    return summary


def _write_views(directory: RunDirectory, tracker: Untracked) -> None:
    """What people look at: curves and the report, also of a run that stopped."""
    write_tensorboard(directory)
    write_report(directory)
    tracker.ended()


def _run(
    config: RunConfig, hosting: Hosting, journal: Journal, saved: checkpoints.Checkpoint | None
) -> dict[str, Any]:
    """Everything between the nodes being there and the report."""
    kind = task_kind(config)
    predictor_baselines(config, journal)
    rate = best_learning_rate(config, hosting, journal, "federated", kind)
    tuned = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate)
    )
    strategy = build_strategy(tuned, hosting, journal, task_kind=kind)
    for line in privacy_notes(config) if saved is None else ():
        journal.note(line)
    resume_from = Checkpointed(saved.server_round, saved.arrays, saved.state) if saved else None
    add_baselines(config, hosting, journal, kind, ("zero_shot", "templates"))
    strategy.start(hosting.grid, resume_from=resume_from)
    _note_budget(config, journal)
    add_baselines(config, hosting, journal, kind, ("local_only", "centralised"))
    selected = _select(config, strategy, journal)
    add_local_tuning(tuned, strategy, journal, kind)
    export(config, strategy, journal.run.path / "adapter")
    summary = summarise(config, strategy, journal.run, selected, saved.server_round if saved else 0)
    summary["learning_rate"] = rate
    journal.run.write_summary(summary)
    return summary


def resumed_config(directory: RunDirectory, runtime: RuntimeConfig | None) -> RunConfig:
    """The configuration that a run was started with, under another runtime if one is given.

    Raises:
        ConfigError: The manifest's configuration does not fit this version of the package.
    """
    config = run_config(directory.manifest["config"])
    return dataclasses.replace(
        config, runtime=runtime or config.runtime, out_dir=str(directory.path)
    )


def left_by(directory: RunDirectory) -> str:
    """The action that left a run directory which holds no training run; empty for a training run."""
    return str(directory.manifest.get("action", ""))


def chosen_runtime(
    directory: RunDirectory, composed: RuntimeConfig, overrides: Sequence[str]
) -> RuntimeConfig:
    """The runtime that a run was started with, under the overrides of a later command.

    Args:
        directory: The run.
        composed: What the overrides compose to; only what they name is taken from it.
        overrides: ``runtime=simulation`` changes the carrier and its settings, and leaves alone what decides rounding
            (dtype and cohort_tokens); ``runtime.threads=2`` changes one setting.

    Raises:
        ConfigError: The manifest's configuration does not fit this version of the package, or nothing was trained.
    """
    if left_by(directory):
        raise ConfigError(
            f"{directory.path}: expected the run directory of a training run, got what action={left_by(directory)} left"
        )
    started = run_config(directory.manifest["config"]).runtime
    named = {o.lstrip("+").partition("=")[0].removeprefix("runtime.") for o in overrides
             if o.lstrip("+").startswith("runtime")}  # fmt: skip
    if "runtime" in named:
        named |= {f.name for f in dataclasses.fields(started)} - {"dtype", "cohort_tokens"}
    taken = {name: getattr(composed, name) for name in named - {"runtime"}}
    return dataclasses.replace(started, **taken)


def whole_json(config: RunConfig) -> str:
    """The configuration with its node-local fields, for use within this process only."""
    tree = dataclasses.asdict(config)
    tree["task"].pop("data_path")
    return json.dumps(tree, sort_keys=True)


def open_existing(config: RunConfig, out_dir: Path) -> RunDirectory | None:
    """The run directory to go on with, or None if there is none.

    Raises:
        ConfigError: It holds a run of another configuration.
    """
    if not (out_dir / "manifest.json").exists():
        return None
    directory = RunDirectory.open(out_dir)
    found = directory.manifest.get("fingerprint")
    if found != config.fingerprint():
        raise ConfigError(
            f"{out_dir}: holds a run with fingerprint {found}, this configuration has {config.fingerprint()}; "
            "name another out_dir"
        )
    return directory


def open_or_create(config: RunConfig, out_dir: Path) -> RunDirectory:
    """The run directory, new or to be gone on with.

    Raises:
        ConfigError: It holds a run of another configuration.
    """
    directory = open_existing(config, out_dir)
    if directory is None:
        tree = json.loads(config.to_json())
        manifest = {
            "experiment": config.experiment,
            "fingerprint": config.fingerprint(),
            "seed": config.seed,
            "config": tree,
            "environment": environment(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        try:
            return RunDirectory.create(out_dir, manifest)
        except OSError as error:
            raise ConfigError(
                f"out_dir: expected a folder that can be written, got {out_dir} ({error.strerror})"
            ) from error
    return directory


def _select(config: RunConfig, strategy: RoundStrategy, journal: Journal) -> int:
    """Put the chosen round's model in place: the last, or the best on validation rows."""
    if config.selection == "last" or journal.best is None:
        return _last_round(journal.run)
    best = checkpoints.latest(journal.run.path / "best", journal.note)
    if best is None or best.server_round != journal.best[1]:
        raise RunStoppedError(
            f"round {journal.best[1]} was best on validation rows, but its copy in best/ is damaged"
        )
    strategy.restore(Checkpointed(best.server_round, best.arrays, best.state))
    return best.server_round


def _last_round(directory: RunDirectory) -> int:
    """The last round that was run: the configured one, unless the privacy budget ended the run before."""
    return max(int(record["round"]) for record in directory.records("round"))


def _note_budget(config: RunConfig, journal: Journal) -> None:
    """Say so if the privacy budget ended the run."""
    last = _last_round(journal.run)
    if last == config.num_rounds or isinstance(config.privacy, NoPrivacy):
        return
    line = (
        f"round {last + 1} of {config.num_rounds} is not run: it would exceed "
        f"privacy.epsilon_budget={config.privacy.epsilon_budget:g}"
    )
    if line not in (event["text"] for event in journal.kept("event")):
        journal.note(line)


def _privacy_figures(config: RunConfig, directory: RunDirectory) -> dict[str, Any]:
    """What the account says at the end; an ε without bound is no figure, and is left out."""
    if isinstance(config.privacy, NoPrivacy):
        return {}
    spent = [r["epsilon"] for r in directory.records("privacy")]
    return {
        "delta": config.privacy.delta,
        "epsilon": spent[-1] if spent else 0.0,
        "stopped_by_budget": _last_round(directory) < config.num_rounds,
    }


def _unlearning_figures(config: RunConfig) -> dict[str, Any]:
    """Who was removed, and what that promises; nothing for a run that nobody was taken out of."""
    unlearning = config.unlearning
    if not unlearning.removed:
        return {}
    removed = ", ".join(str(client) for client in unlearning.removed)
    told = {"removal": unlearning.removal, "exactness": unlearning.exactness}
    return {"removed_clients": removed, **(told if unlearning.removal != "none" else {})}


def summarise(
    config: RunConfig, strategy: RoundStrategy, directory: RunDirectory, selected: int, resumed: int
) -> dict[str, Any]:
    """The final figures as one flat object; a metric that does not apply is absent."""
    rounds = {record["round"]: record for record in directory.records("round")}
    chosen = rounds[selected]
    summary: dict[str, Any] = {
        "experiment": config.experiment,
        "method": config.method.name,
        "strategy": config.strategy.name,
        "seed": config.seed,
        "num_clients": config.partition.num_clients,
        "num_rounds": config.num_rounds,
        "selected_round": selected,
        "fingerprint": config.fingerprint(),
        "resumed_rounds": resumed,
        "dropped_replies": len([f for f in directory.records("failure") if f["round"] > 0]),
        "seconds": sum(record["seconds"] for record in rounds.values()),
        **_privacy_figures(config, directory),
        **_unlearning_figures(config),
        "adapter_sha256": records.arrays_sha256(
            {
                k: v
                for k, v in strategy.checkpoint(selected).arrays.items()
                if not k.startswith("optimizer/")
            }
        ),
    }
    for name in (
        "accuracy",
        "loss",
        "worst_client_accuracy",
        "worst_decile_accuracy",
        "mean_client_accuracy",
        "worst_group_accuracy",
        "max_group_gap",
        "bits_per_character",
        "validation_accuracy",
        "reconstruction_r2",
        "state_energy_share",
        "prompt_epsilon",
    ):
        if name in chosen:
            summary[name] = chosen[name]
    for direction in ("uplink", "downlink"):
        for kind, prefix in (("train", ""), ("evaluate", "evaluate_")):
            summary[f"{prefix}{direction}_bytes"] = sum(
                r["bytes"]
                for r in directory.records("bytes")
                if r["direction"] == direction and r["message"] == kind
            )
    short = {"local_only": "local", "centralised": "central"}
    for baseline in directory.records("baseline"):
        prefix = short.get(baseline["name"], baseline["name"])
        for name in ("accuracy", "loss", "bits_per_character", *WORST):
            if name in baseline:
                summary[f"{prefix}_{name}"] = baseline[name]
    return summary


WORST = ("worst_decile_accuracy", "worst_group_accuracy")
"""Of baselines, what the summary has beside the mean."""


def quiet_flower(verbose: bool) -> None:
    """Silence Flower's own log lines unless they are asked for; its import sets DEBUG and a handler."""
    logger = logging.getLogger("flwr")
    if not verbose:
        logger.setLevel(logging.WARNING)
