"""A cascade whose first tier is at the clients: calibrate it there, or answer the clients' own queries.

Carried by whatever carries a training run: one process, Flower's simulation, or a SuperLink.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.cascading import (
    THRESHOLDS,
    check_votes,
    open_chain,
    plain_threshold,
    said_threshold,
)
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import quiet_flower
from fedllm_flwr.errors import ConfigError, FedLLMError
from fedllm_flwr.limits import BoundedGrid
from fedllm_flwr.runs.atomic import write_json
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.environment import environment
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.runs.writer import only_writer
from fedllm_flwr.settings.adaptation import ModelConfig
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tasks.catalog import TASKS
from fedllm_flwr.tiers import Answered, Chain, LocalMember, Tier, pack_tier
from strategies.calibration import FederatedCalibration
from strategies.hosting import Hosting
from strategies.queries import FederatedQueries

ACTIONS = ("calibrate", "query")


class WireAccount:
    """Keeps what a federated cascade did in a run directory: bytes by message and direction, failures, events."""

    def __init__(self, run: RunDirectory, progress: Progress) -> None:
        self.run = run
        self._progress = progress
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._messages: Counter[tuple[str, str]] = Counter()

    def note(self, text: str) -> None:
        """Keep and show one line."""
        self.run.append({"kind": "event", "text": text})
        self._progress.note(text)

    def count(self, kind: str, direction: str, message: Message) -> None:
        """Add a message's serialised size."""
        self._bytes[kind, direction] += records.serialized_bytes(message)
        self._messages[kind, direction] += 1

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """Keep and show that a client's answer is missing or was dropped."""
        self.run.append({"kind": "failure", "round": server_round, "partition_id": partition_id,
                         "reason": reason})  # fmt: skip
        self._progress.note(f"client {partition_id} is left out: {reason}")

    def total(self, direction: str) -> int:
        """Bytes of all messages in one direction."""
        return sum(count for (_, own), count in self._bytes.items() if own == direction)

    def close(self) -> None:
        """Write the bytes down."""
        for (kind, direction), count in sorted(self._bytes.items()):
            self.run.append({"kind": "bytes", "round": 1, "direction": direction, "message": kind,
                             "bytes": count, "messages": self._messages[kind, direction]})  # fmt: skip
        self.run.sync()


def prepared(config: RunConfig, cascade: CascadeConfig, action: str) -> RunConfig:
    """Find what is wrong with a federated cascade before a process starts or a file is written.

    Returns:
        The configuration with the first tier's model for its own, so that nodes load no other one.

    Raises:
        ConfigError: There is no chain, a member cannot be used or is no model that computes at clients, thresholds are
            needed, or the server cannot know the task.
    """
    return _opened(config, cascade, action)[0]


def federate(grid: Grid, config: RunConfig, cascade: CascadeConfig, action: str) -> dict[str, Any]:
    """Calibrate the first tier at the clients (``calibrate``), or answer the clients' queries (``query``).

    Args:
        grid: Flower's transport.
        config: Task, partition, seed and runtime; ``out_dir`` becomes a run directory.
        cascade: The tiers. The first one goes to the clients, the others stay here.
        action: Which of the two. ``query`` calibrates first where no thresholds are set, for two tiers.

    Returns:
        The summary.

    Raises:
        ConfigError: See :func:`prepared`; or the folder holds a run already.
        RunStoppedError: Too few clients answered.
    """
    quiet_flower(config.runtime.verbose)
    config, task, tiers = _opened(config, cascade, action)
    run = RunDirectory.create(config.out_dir, _manifest(config, cascade, action))
    with only_writer(run), Progress() as progress:
        account = WireAccount(run, progress)
        began = time.monotonic()
        try:
            summary = _exchanges(grid, config, cascade, action, account, task, tiers)
        except Exception as error:
            with suppress(OSError):  # a full disk must not hide why it stopped
                account.note(f"stopped: {error if isinstance(error, FedLLMError) else repr(error)}")
            raise
        finally:
            account.close()
        summary |= {
            f"{direction}_bytes": account.total(direction) for direction in ("uplink", "downlink")
        }
        summary["seconds"] = time.monotonic() - began
        run.write_summary(summary)
    return run.summary()


def tiers_override(cascade: CascadeConfig) -> str:
    """The tiers as a Hydra override that means the same from any folder: paths are absolute."""
    tiers = []
    for tier in cascade.tiers:
        members = tuple(
            replace(own, run=_absolute(own.run), path=_absolute(own.path)) for own in tier.members
        )
        tiers.append(asdict(replace(tier, members=members)))
    return f"cascade.tiers={_hydra_value(tiers)}"


def _opened(
    config: RunConfig, cascade: CascadeConfig, action: str
) -> tuple[RunConfig, Task, tuple[Tier, ...]]:
    """Settings, task and tiers, checked; see :func:`prepared`."""
    if config.runtime.name == "deployment" and TASKS[config.task.name].kind is None:
        raise ConfigError(
            f"action={action}, runtime=deployment and task={config.task.name}: the server answers what is deferred and "
            "cannot read the nodes' files, use a task of the catalog"
        )
    check_votes(cascade, action)
    task, tiers = open_chain(config, cascade)
    pack_tier(tiers[0])
    if action == "query" and not cascade.thetas and len(tiers) > 2:
        raise ConfigError(
            "action=query: clients calibrate the first tier only, expected cascade.thetas with more than two tiers"
        )
    ref = next(member.ref for member in tiers[0].members if isinstance(member, LocalMember))
    model = ModelConfig(name=ref.name, hub_id=ref.hub_id, revision=ref.revision)
    runtime = replace(config.runtime, model_path=ref.path or config.runtime.model_path)
    return replace(config, model=model, runtime=runtime), task, tiers


def _exchanges(
    grid: Grid,
    config: RunConfig,
    cascade: CascadeConfig,
    action: str,
    account: WireAccount,
    task: Task,
    tiers: Sequence[Tier],
) -> dict[str, Any]:
    """Everything that crosses the wire; returns the summary without bytes and time."""
    grid = BoundedGrid(grid, config.runtime.max_message_mb)
    hosting = Hosting(grid, config.runtime.node_wait_seconds, account.note, account.count)
    hosting.refresh()
    summary: dict[str, Any] = {"experiment": config.experiment, "action": action, "seed": config.seed,
                               "num_clients": config.partition.num_clients}  # fmt: skip
    thetas = cascade.thetas
    if action == "calibrate" or not thetas:
        strategy = FederatedCalibration(config, hosting, account, pack_tier(tiers[0]), cascade)
        found = strategy.calibrate(grid)
        name = tiers[0].config.name
        account.note(f"tier {name}: {said_threshold(found)}")
        write_json(account.run.path / THRESHOLDS,
                   {"split": "clients' validation", "tiers": {name: plain_threshold(found)}})  # fmt: skip
        thetas = (found.theta,)
        summary |= {
            f"calibration_{key}": value
            for key, value in plain_threshold(found).items()
            if math.isfinite(value)
        }
    if action == "query":
        summary |= _query(grid, config, hosting, account, task, tiers, thetas)
    return summary


def _query(
    grid: Grid,
    config: RunConfig,
    hosting: Hosting,
    account: WireAccount,
    task: Task,
    tiers: Sequence[Tier],
    thetas: Sequence[float],
) -> dict[str, Any]:
    chain = Chain(tuple(tiers[1:]), tuple(thetas[1:]))
    walked: list[Answered] = []

    def answer(texts: Sequence[str]) -> list[str | None]:
        start = len(walked)
        rows = [Row(f"deferred-{start + n}", text, "") for n, text in enumerate(texts)]
        walked.extend(chain.answer(task, rows))
        return [found.text for found in walked[start:]]

    strategy = FederatedQueries(config, hosting, account, pack_tier(tiers[0]), thetas[0], answer)
    served = strategy.serve(grid)
    client_cost = tiers[0].price.cost(served.input_tokens, served.output_tokens)
    server_cost = sum((found.cost for found in walked), Fraction(0))
    return {
        "queries": served.queries,
        "accuracy": served.correct / served.queries if served.queries else None,
        "deferred": served.deferred,
        "deferral_rate": served.deferred / served.queries if served.queries else None,
        "deferred_accuracy": served.deferred_correct / served.deferred if served.deferred else None,
        "deferred_text_bytes": served.text_bytes,
        "client_input_tokens": served.input_tokens,
        "client_output_tokens": served.output_tokens,
        "client_cost": float(client_cost),
        "server_cost": float(server_cost),
        "clients": served.clients,
    }


def _manifest(config: RunConfig, cascade: CascadeConfig, action: str) -> Mapping[str, Any]:
    return {
        "experiment": config.experiment,
        "action": action,
        "fingerprint": config.fingerprint(),
        "seed": config.seed,
        "config": json.loads(config.to_json()),
        "cascade": asdict(cascade),
        "environment": environment(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


def _hydra_value(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, whose keys are not quoted."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra_value(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_hydra_value(own) for own in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("'", "\\'")
        return f"'{escaped}'"
    return str(value).lower() if isinstance(value, bool) else repr(value)
