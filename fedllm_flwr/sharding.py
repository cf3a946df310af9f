"""Runs whose clients are divided into shards: each shard is a run of its own, and the model is the mean of theirs.

A client is then in one shard's model alone, and taking it out means training that shard again. A shard's run has the
settings of the whole, with every client of the other shards passed over: its cohorts are the parts of the whole's that
are in it.

Source:
    Bourtoule et al. 2021, Machine unlearning (SISA), with clients in place of rows, without slices, and with a mean of
    the shards' adapters in place of a vote. The mean of LoRA's factors is that of their products where one side is
    shared (``method.sharing=b_only``), and always for prompts.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.unlearning import UnlearningConfig
from fedllm_flwr.unlearning.removal import shard_mean, shards_of
from strategies import Hosting, build_strategy
from strategies.baselines import Recorder
from strategies.observer import UNMEASURED, Checkpointed
from strategies.sift import joined, parted, set_model

SHARDS = "shards"
TAKEN_OVER = ("bytes", "client", "failure")
"""Records of the shards' runs that are also the whole's."""


def members_of(config: RunConfig) -> dict[int, tuple[int, ...]]:
    """The clients of each shard that has any, without those that were removed."""
    there = (p for p in range(config.partition.num_clients) if p not in config.unlearning.removed)
    return shards_of(there, config.unlearning.shards, config.seed)


def shard_config(config: RunConfig, shard: int) -> RunConfig:
    """The settings of one shard's run; they do not depend on who is in the others."""
    members = members_of(config)[shard]
    others = tuple(p for p in range(config.partition.num_clients) if p not in members)
    off = {f.name: False for f in dataclasses.fields(config.baselines) if f.type is bool}
    return dataclasses.replace(
        config,
        evaluate_every=config.num_rounds,
        baselines=dataclasses.replace(config.baselines, **off),  # type: ignore[arg-type]
        unlearning=UnlearningConfig(
            name="ledger", retention=config.unlearning.retention, removed=others
        ),
    )


def shard_folder(run: Path, shard: int) -> Path:
    """Where a shard's run directory is."""
    return run / SHARDS / f"shard-{shard:04d}"


def train_shards(
    config: RunConfig,
    directory: RunDirectory,
    hosting: Hosting,
    run: Callable[[RunConfig, Path], Any],
    kind: str,
) -> None:
    """Train the shards that are not finished, and save the mean of all as the last round's checkpoint.

    Args:
        config: The whole run.
        directory: Its directory.
        hosting: Its nodes.
        run: Runs or resumes a shard in its own directory.
        kind: Of the task.

    Raises:
        RunStoppedError: A shard's run gave up; the same call goes on.
    """
    models: dict[int, np.ndarray] = {}
    parts: dict[str, np.ndarray] = {}
    directory.truncate_after(-1)
    for shard, members in members_of(config).items():
        own, folder = shard_config(config, shard), shard_folder(directory.path, shard)
        text = f"shard {shard}: {len(members)} clients"
        if text not in (event["text"] for event in directory.records("event")):
            directory.append({"kind": "event", "text": text})
        if not (folder / "summary.json").exists():
            run(own, folder)
        for record in RunDirectory.open(folder).records():
            if record["kind"] in TAKEN_OVER:
                directory.append(record)
        parts = _values(own, folder, hosting, kind)
        models[shard] = joined(parts)
    recorder = Recorder(lambda text: None)
    whole = build_strategy(_without_steps(config), hosting, recorder, task_kind=kind)
    mean = shard_mean(models).astype(np.float32)
    set_model(whole, parted(mean, parts), config.num_rounds)
    made = whole.snapshot(config.num_rounds)
    state = json.loads(json.dumps({**made.state, UNMEASURED: True}))
    checkpoints.save(directory.checkpoints, made.server_round, made.arrays, state)


def _without_steps(config: RunConfig) -> RunConfig:
    """The mean is the model as it is; the server optimizer has made its steps in the shards."""
    plain = {"server_optimizer": "fedavg", "server_learning_rate": 0.0, "server_momentum": -1.0}
    strategy = dataclasses.replace(config.strategy, **plain)  # type: ignore[arg-type]
    return dataclasses.replace(config, strategy=strategy)


def _values(config: RunConfig, folder: Path, hosting: Hosting, kind: str) -> dict[str, np.ndarray]:
    """What clients train of a shard's last model, by part."""
    saved = checkpoints.at(folder / "checkpoints", config.num_rounds)
    if saved is None:
        raise RunStoppedError(
            f"{folder}: its last checkpoint is missing or damaged; delete the folder and resume"
        )
    strategy = build_strategy(config, hosting, Recorder(lambda text: None), task_kind=kind)
    strategy.resume(Checkpointed(saved.server_round, saved.arrays, saved.state))
    strategy.begin_sum(config.num_rounds)
    return {n: values.copy() for n, values in strategy.start_values(config.num_rounds).items()}
