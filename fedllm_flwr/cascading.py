"""Cascades of real models in one place: ask every tier about a task's queries, choose thresholds, draw curves."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm_flwr.cascade import (
    FORMATS,
    TOKENS,
    Beside,
    Calibrated,
    Recording,
    promise,
    recording,
    replay,
    tier_outcomes,
)
from fedllm_flwr.cascade.curves import cascade as walked
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.next_words import arrival_rows, batch_costs, word_rows
from fedllm_flwr.runs.atomic import write_json, write_text
from fedllm_flwr.semantic_chain import run_texts
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.records import read_json_lines
from fedllm_flwr.tiers import (
    Computing,
    Tier,
    calibrated_thetas,
    check_unseen,
    load_tier,
    record_lines,
    timed_lines,
)

ANSWERS, VALIDATION, THRESHOLDS = "answers.jsonl", "validation.jsonl", "thresholds.json"
SAMPLES, TIMED = "samples.jsonl", "timed.jsonl"
SUFFIXES = {"markdown": "md", "csv": "csv", "json": "json"}

Note = Callable[[str], None]


def run_chain(config: RunConfig, cascade: CascadeConfig, note: Note) -> list[dict[str, Any]]:
    """Let every tier answer every test row, keep the answers, and draw the curves of a replay from them.

    Where no thresholds are set and the task has validation rows, these are answered too: they decide the thresholds,
    and teach a router that reads the queries alone. The tables lie beside the answers, in all formats.

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
    if cascade.agreement != "vote":
        return _tabled(run_texts(cascade, task, tiers, config.seed, folder, note), folder)
    thetas: tuple[float, ...] | None = cascade.thetas or None
    held_out = None
    if thetas is None and task.splits["validation"]:
        held_out = _record(tiers[:-1], task, task.splits["validation"], folder / VALIDATION, note)
        thetas = _calibrated(held_out, cascade, folder, note)
    beside = _beside(tiers, task, cascade, held_out, folder, note)
    record = _record(tiers, task, task.splits["test"], folder / ANSWERS, note)
    rows = replay(
        record,
        {tier.config.name: tier.price for tier in tiers},
        config.seed,
        thetas=thetas,
        parallelism={tier.config.name: tier.config.rho for tier in tiers},
        beside=beside,
    )
    if task.one_word:
        rows += word_rows(tiers, task, task.splits["test"], note)
    if cascade.arrivals_per_second:
        rows += _arrivals(tiers, task, cascade, record, thetas, config.seed)
    return _tabled(rows, folder)


def _arrivals(
    tiers: Sequence[Tier],
    task: Task,
    cascade: CascadeConfig,
    record: Recording,
    thetas: tuple[float, ...] | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Random arrivals at the chain: by its thresholds, or where there are none, by agreement of all members."""
    voted = [tier_outcomes(rows, TOKENS) for rows in record.tiers.values()]
    walk = walked(voted, thetas or (1.0,) * (len(tiers) - 1))
    rows = task.splits["test"]
    first, last = (batch_costs(tier, task, rows) for tier in (tiers[0], tiers[-1]))
    return arrival_rows(walk, first, last, cascade.arrivals_per_second, seed)


def _tabled(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows, kept in every format."""
    for name, render in FORMATS.items():
        write_text(folder / f"curve.{SUFFIXES[name]}", render(rows))
    return rows


def _beside(
    tiers: Sequence[Tier],
    task: Task,
    cascade: CascadeConfig,
    held_out: Recording | None,
    folder: Path,
    note: Note,
) -> Beside:
    """Samples of one member, the router, and times of queries that come alone: what they can be had for."""
    rows, first = task.splits["test"], tiers[0]
    samples = timed = promised = None
    if cascade.samples_temperature:
        one = replace(first.config, members=first.config.members[:1], kind="self_consistency",
                      samples=max(2, first.config.size), temperature=cascade.samples_temperature)  # fmt: skip
        sampled = Tier(one, first.members[:1], first.seed)
        samples = _record([sampled], task, rows, folder / SAMPLES, note)
    if held_out is not None:
        outcomes = tier_outcomes(held_out.tiers[first.config.name], TOKENS)
        known = [row.text for row in task.splits["validation"]]
        promised = promise(known, outcomes.correct, [row.text for row in rows])
    if cascade.timed_queries:
        lines = timed_lines(tiers, task, rows[: cascade.timed_queries], note)
        timed = _kept(lines, folder / TIMED)
    return Beside(samples, promised, timed)


def check_votes(cascade: CascadeConfig, action: str) -> None:
    """Refuse what needs the rows of a task: a similarity to look at, and prompts that are chosen by a row's group.

    Raises:
        ConfigError: The agreement is not ``vote``, or a member has prompts of clusters.
    """
    chosen = [member.run for tier in cascade.tiers for member in tier.members if member.clusters]
    if chosen:
        raise ConfigError(
            f"cascade member {chosen[0]} with clusters=true: expected with action=cascade, whose rows have groups; "
            f"queries of action={action} have none"
        )
    if cascade.agreement != "vote":
        raise ConfigError(
            f"cascade.agreement={cascade.agreement}: expected with action=cascade, where thresholds are looked at; "
            f"action={action} takes votes"
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
    return _kept(record_lines(tiers, task, rows, note), path)


def _kept(lines: Iterable[Mapping[str, Any]], path: Path) -> Recording:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    records_read = [(record.line, record.values) for record in read_json_lines(path)]
    return recording(records_read, path.name)


def _calibrated(
    held_out: Recording, cascade: CascadeConfig, folder: Path, note: Note
) -> tuple[float, ...]:
    found = calibrated_thetas(held_out, cascade)
    names = list(held_out.tiers)
    for name, own in zip(names, found, strict=True):
        note(f"tier {name}: {said_threshold(own)}")
    chosen = {name: plain_threshold(own) for name, own in zip(names, found, strict=True)}
    write_json(folder / THRESHOLDS, {"split": "validation", "tiers": chosen})
    return tuple(own.theta for own in found)


def plain_threshold(found: Calibrated) -> dict[str, Any]:
    """A threshold for JSON; that of a tier that is never safe is null."""
    return {name: getattr(found, name) for name in
            ("theta", "risk", "bound", "accepted", "errors", "total")}  # fmt: skip


def said_threshold(found: Calibrated) -> str:
    """One line about a threshold, for people."""
    if found.theta > 1:
        return (
            f"no threshold is safe for risk {found.risk:g} on {found.total} queries, it defers all"
        )
    return (
        f"answers from an agreement of {found.theta:g} on: {found.errors} of {found.accepted} held-out answers are "
        f"wrong, at most {found.bound:.3g} with confidence"
    )
