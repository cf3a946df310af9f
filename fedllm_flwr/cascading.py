"""Cascades of real models: ask every tier about a task's queries, calibrate at the clients, serve their queries."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.cascade import Calibrated, Recording, recording, replay
from fedllm_flwr.client_app import app
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import quiet_flower
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.launch import state_folder
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.runs.atomic import write_json, write_text
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.environment import environment
from fedllm_flwr.settings.adaptation import ModelConfig
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.records import read_json_lines
from fedllm_flwr.tiers import (
    Answered,
    Chain,
    Computing,
    LocalMember,
    Tier,
    calibrated_thetas,
    check_unseen,
    load_tier,
    pack_tier,
    record_lines,
)
from strategies.calibration import FederatedCalibration
from strategies.hosting import Hosting
from strategies.queries import FederatedQueries

ANSWERS, VALIDATION, THRESHOLDS = "answers.jsonl", "validation.jsonl", "thresholds.json"

Note = Callable[[str], None]


def run_chain(config: RunConfig, cascade: CascadeConfig, note: Note) -> list[dict[str, Any]]:
    """Let every tier answer every test row, keep the answers, and draw the curves of a replay from them.

    Where no thresholds are set and the task has validation rows, these are answered too and decide the thresholds.

    Args:
        config: Task, seed and runtime; ``out_dir`` gets the answers.
        cascade: The tiers.
        note: Told what happens, line by line.

    Returns:
        Rows as of :func:`fedllm_flwr.cascade.replay`.

    Raises:
        ConfigError: There is no chain, the folder has answers already, or a member cannot be used.
        RunStoppedError: An endpoint does not answer.
    """
    folder = Path(config.out_dir)
    task, tiers = open_chain(config, cascade)
    if (folder / ANSWERS).exists():
        raise ConfigError(
            f"{folder}: holds answers already; replay={folder / ANSWERS}, or name another out_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    thetas: tuple[float, ...] | None = cascade.thetas or None
    if thetas is None and task.splits["validation"]:
        held_out = _record(tiers[:-1], task, task.splits["validation"], folder / VALIDATION, note)
        thetas = _calibrated(held_out, cascade, folder, note)
    record = _record(tiers, task, task.splits["test"], folder / ANSWERS, note)
    return replay(
        record,
        {tier.config.name: tier.price for tier in tiers},
        config.seed,
        thetas=thetas,
        parallelism={tier.config.name: tier.config.rho for tier in tiers},
    )


def open_chain(config: RunConfig, cascade: CascadeConfig) -> tuple[Task, tuple[Tier, ...]]:
    """The task, and tiers that can be asked.

    Raises:
        ConfigError: There is no chain, or a member cannot be used: among them one that has seen the queries.
    """
    if not cascade.tiers:
        raise ConfigError(
            "action=cascade: needs replay=<JSON Lines file of answers>, or two or more cascade.tiers, got none"
        )
    runtime = config.runtime
    task = load_task(config.task.options(runtime.data_path), config.rows_seed)
    members = [member for tier in cascade.tiers for member in tier.members]
    queries = [*task.splits["validation"], *task.splits["test"]]
    check_unseen(members, queries, runtime.data_path)
    computing = Computing(runtime.dtype, runtime.device, runtime.threads)
    tiers = tuple(load_tier(tier, config.task, computing, config.seed) for tier in cascade.tiers)
    return task, tiers


def _record(
    tiers: Sequence[Tier], task: Task, rows: Sequence[Row], path: Path, note: Note
) -> Recording:
    """Answers in a file, once all are there, and what a replay reads from it."""
    lines = (json.dumps(line) + "\n" for line in record_lines(tiers, task, rows, note))
    write_text(path, "".join(lines))
    records_read = [(record.line, record.values) for record in read_json_lines(path)]
    return recording(records_read, path.name)


def _calibrated(
    held_out: Recording, cascade: CascadeConfig, folder: Path, note: Note
) -> tuple[float, ...]:
    found = calibrated_thetas(held_out, cascade)
    names = list(held_out.tiers)
    for name, own in zip(names, found, strict=True):
        note(f"tier {name}: {_said(own)}")
    chosen = {name: _plain(own) for name, own in zip(names, found, strict=True)}
    write_json(folder / THRESHOLDS, {"split": "validation", "tiers": chosen})
    return tuple(own.theta for own in found)


def _plain(found: Calibrated) -> dict[str, Any]:
    """A threshold for JSON; that of a tier that is never safe is null."""
    return {name: getattr(found, name) for name in
            ("theta", "risk", "bound", "accepted", "errors", "total")}  # fmt: skip


def _said(found: Calibrated) -> str:
    if found.theta > 1:
        return (
            f"no threshold is safe for risk {found.risk:g} on {found.total} queries, it defers all"
        )
    return (
        f"answers from an agreement of {found.theta:g} on: {found.errors} of {found.accepted} held-out answers are "
        f"wrong, at most {found.bound:.3g} with confidence"
    )


# At the clients ------------------------------------------------------------------------------------------------------


class WireAccount:
    """Keeps what a federated cascade did in a run directory: bytes by message and direction, failures, events."""

    def __init__(self, run: RunDirectory, note: Note) -> None:
        self.run = run
        self._note = note
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._messages: Counter[tuple[str, str]] = Counter()

    def note(self, text: str) -> None:
        """Keep and show one line."""
        self.run.append({"kind": "event", "text": text})
        self._note(text)

    def count(self, kind: str, direction: str, message: Message) -> None:
        """Add a message's serialised size."""
        self._bytes[kind, direction] += records.serialized_bytes(message)
        self._messages[kind, direction] += 1

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """Keep and show that a client's answer is missing or was dropped."""
        self.run.append({"kind": "failure", "round": server_round, "partition_id": partition_id,
                         "reason": reason})  # fmt: skip
        self._note(f"client {partition_id} is left out: {reason}")

    def total(self, direction: str) -> int:
        """Bytes of all messages in one direction."""
        return sum(count for (_, own), count in self._bytes.items() if own == direction)

    def close(self) -> None:
        """Write the bytes down."""
        for (kind, direction), count in sorted(self._bytes.items()):
            self.run.append({"kind": "bytes", "round": 1, "direction": direction, "message": kind,
                             "bytes": count, "messages": self._messages[kind, direction]})  # fmt: skip
        self.run.sync()


def loopback_grid(config: RunConfig) -> Grid:
    """Nodes in this process.

    Raises:
        ConfigError: Another runtime is chosen.
    """
    if config.runtime.name != "loopback":
        raise ConfigError(
            f"runtime={config.runtime.name}: expected runtime=loopback with a cascade at the clients"
        )
    facts = {
        "data-path": config.runtime.data_path,
        "model-path": config.runtime.model_path,
        "state-path": str(state_folder(config)),
    }
    return LoopbackGrid(app, min(config.runtime.num_nodes, config.partition.num_clients), facts)  # type: ignore[arg-type]


def federate(
    grid: Grid, config: RunConfig, cascade: CascadeConfig, action: str, note: Note
) -> dict[str, Any]:
    """Calibrate the first tier at the clients (``calibrate``), or answer the clients' queries (``query``).

    Args:
        grid: Flower's transport.
        config: Task, partition, seed and runtime; ``out_dir`` becomes a run directory.
        cascade: The tiers. The first one goes to the clients, the others stay here.
        action: Which of the two. ``query`` calibrates first where no thresholds are set, for two tiers.
        note: Told what happens.

    Returns:
        The summary.

    Raises:
        ConfigError: There is no chain, a member cannot be used, or thresholds are needed.
        RunStoppedError: Too few clients answered.
    """
    quiet_flower(config.runtime.verbose)
    _, tiers = open_chain(config, cascade)
    packed = pack_tier(tiers[0])
    config = _with_model(config, tiers[0])
    if action == "query" and not cascade.thetas and len(tiers) > 2:
        raise ConfigError(
            "action=query: clients calibrate the first tier only, expected cascade.thetas with more than two tiers"
        )
    run = RunDirectory.create(config.out_dir, _manifest(config, cascade, action))
    account = WireAccount(run, note)
    began = time.monotonic()
    hosting = Hosting(grid, config.runtime.node_wait_seconds, account.note, account.count)
    hosting.refresh()
    summary: dict[str, Any] = {"experiment": config.experiment, "action": action, "seed": config.seed,
                               "num_clients": config.partition.num_clients}  # fmt: skip
    try:
        thetas = cascade.thetas
        if action == "calibrate" or not thetas:
            strategy = FederatedCalibration(config, hosting, account, packed, cascade)
            found = strategy.calibrate(grid)
            account.note(f"tier {tiers[0].config.name}: {_said(found)}")
            write_json(run.path / THRESHOLDS, {"split": "clients' validation",
                                               "tiers": {tiers[0].config.name: _plain(found)}})  # fmt: skip
            thetas = (found.theta,)
            summary |= {
                f"calibration_{name}": value
                for name, value in _plain(found).items()
                if math.isfinite(value)
            }
        if action == "query":
            summary |= _query(grid, config, hosting, account, tiers, thetas)
    finally:
        account.close()
    summary |= {
        f"{direction}_bytes": account.total(direction) for direction in ("uplink", "downlink")
    }
    summary["seconds"] = time.monotonic() - began
    run.write_summary(summary)
    return run.summary()


def _query(
    grid: Grid,
    config: RunConfig,
    hosting: Hosting,
    account: WireAccount,
    tiers: Sequence[Tier],
    thetas: Sequence[float],
) -> dict[str, Any]:
    task = load_task(config.task.options(config.runtime.data_path), config.rows_seed)
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


def _with_model(config: RunConfig, tier: Tier) -> RunConfig:
    """The configuration with the tier's model for its own, so that nodes load no other one."""
    ref = next(member.ref for member in tier.members if isinstance(member, LocalMember))
    model = ModelConfig(name=ref.name, hub_id=ref.hub_id, revision=ref.revision)
    runtime = replace(config.runtime, model_path=ref.path or config.runtime.model_path)
    return replace(config, model=model, runtime=runtime)


def _manifest(config: RunConfig, cascade: CascadeConfig, action: str) -> Mapping[str, Any]:
    return {
        "experiment": config.experiment,
        "action": action,
        "fingerprint": config.fingerprint(),
        "seed": config.seed,
        "config": json.loads(config.to_json()),
        "cascade": cascade.name,
        "thetas": list(cascade.thetas),
        "environment": environment(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
