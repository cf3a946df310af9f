"""How far a run is, read from its directory alone: for operators and monitors, while it runs or afterwards."""

import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedllm_flwr.runs.checkpoints import NAME
from fedllm_flwr.runs.directory import METRICS, RunDirectory

LOCK = ".lock"
"""Held by whoever writes to a run directory; the system lets go of it when that process ends."""

SHOWN = ("accuracy", "loss", "validation_accuracy", "train_loss", "worst_client_accuracy")
STOPPED = "stopped: "


def run_status(directory: RunDirectory) -> dict[str, Any]:
    """Facts about a run; a fact that is not known is absent.

    Args:
        directory: The run. Nothing in it is changed.

    Returns:
        ``state`` (finished; running: a process of this machine holds the directory; stopped: the run gave up,
        ``reason`` says why; interrupted: its process was ended), round and rounds, the cohort's size and answers so
        far, the last complete round's figures, dropped replies, the newest checkpoint, and seconds since the last
        record.

    Raises:
        DataError: metrics.jsonl is damaged.
    """
    records = directory.records()
    rounds = [record for record in records if record["kind"] == "round"]
    config = directory.manifest.get("config", {})
    found: dict[str, Any] = {
        "run": str(directory.path.resolve()),
        "experiment": directory.manifest.get("experiment"),
        "fingerprint": directory.manifest.get("fingerprint"),
        "state": _state(directory, records),
        "round": rounds[-1]["round"] if rounds else 0,
        "num_rounds": config.get("num_rounds"),
        "checkpoint": _newest(directory.checkpoints),
        "dropped_replies": sum(record["kind"] == "failure" for record in records),
        "seconds_since_last_record": _age(directory.path / METRICS),
    }
    if found["state"] == "stopped":
        found["reason"] = _last_stop(records)
    if found["state"] == "running":
        found |= _under_way(records)
    if rounds:
        found |= {name: rounds[-1][name] for name in SHOWN if rounds[-1].get(name) is not None}
    return {name: value for name, value in found.items() if value is not None}


def _state(directory: RunDirectory, records: list[dict[str, Any]]) -> str:
    if directory.is_finished:
        return "finished"
    if _is_held(directory.path / LOCK):
        return "running"
    return "stopped" if _last_stop(records) else "interrupted"


def _is_held(lock: Path) -> bool:
    """Whether another process of this machine writes to the directory."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's directory: whoever may not write cannot ask
        return False


def _last_stop(records: list[dict[str, Any]]) -> str | None:
    """Why the run gave up, unless it has gone on since then."""
    told = ("event", "started", "round")
    last = next((record for record in reversed(records) if record["kind"] in told), None)
    if last is None or not str(last.get("text", "")).startswith(STOPPED):
        return None
    return str(last["text"]).removeprefix(STOPPED)


def _under_way(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The round that is being trained: its number, its cohort's size, and how many have answered."""
    begun = [number for number, record in enumerate(records) if record["kind"] == "started"]
    if not begun or any(record["kind"] == "round" for record in records[begun[-1] :]):
        return {}
    started = records[begun[-1]]
    answered = sum(record["kind"] == "client" for record in records[begun[-1] :])
    return {
        "round_under_way": started["round"],
        "cohort_size": started["cohort_size"],
        "answered": answered,
    }


def _newest(checkpoints: Path) -> int | None:
    """The round of the newest checkpoint; whether it is whole, a resume finds out."""
    if not checkpoints.is_dir():
        return None
    found = [int(match[1]) for name in os.listdir(checkpoints) if (match := NAME.fullmatch(name))]
    return max(found, default=None)


def _age(path: Path) -> float | None:
    """Seconds since a file was last written to."""
    try:
        return round(max(0.0, time.time() - path.stat().st_mtime), 1)
    except FileNotFoundError:
        return None
