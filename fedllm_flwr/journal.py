"""The run's memory: tells the run directory, the checkpoints and the progress display what a strategy reports."""

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.unlearning.ledger import Contribution, Ledger
from strategies.observer import Checkpointed

DIRECTIONS = ("uplink_bytes", "downlink_bytes")
LEDGER = "ledger"
"""Folder of a run directory that has its clients' updates, where the run keeps them."""


def open_ledger(run: RunDirectory) -> Ledger | None:
    """The updates that a run has kept; None if it was not told to, or no round is complete.

    Raises:
        DataError: The ledger is damaged; names the file.
    """
    folder = run.path / LEDGER
    return Ledger(folder, write_bytes) if (folder / "ledger.json").is_file() else None


def peak_memory_bytes() -> int:
    """Largest resident memory that this process has had, in bytes.

    From Linux's own status file where there is one: ``ru_maxrss`` begins at the peak of the parent process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Journal:
    """The observer of a run that is kept (see :class:`strategies.rounds.Observer`).

    Args:
        run: The run directory.
        config: The run.
        progress: The display.

    Attributes:
        after_round: Called when a round is complete and saved, for whoever else wants its figures.
    """

    def __init__(self, run: RunDirectory, config: RunConfig, progress: Progress) -> None:
        self.run = run
        self._config = config
        self._progress = progress
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._messages: Counter[tuple[str, str]] = Counter()
        self._so_far: Counter[str] = Counter()
        self._began = time.monotonic()
        self._done = 0
        self.best: tuple[float, int] | None = None
        self.after_round: Callable[[], None] = lambda: None
        self._ledger = open_ledger(run)
        self._recorded = 0

    def note(self, text: str) -> None:
        """Keep and show one line."""
        self.run.append({"kind": "event", "text": text})
        self._progress.note(text)

    def count(self, kind: str, direction: str, message: Message) -> None:
        """Add a message's serialised size to the byte ledger."""
        kind = kind.partition(".")[0]
        self._bytes[kind, direction] += records.serialized_bytes(message)
        self._messages[kind, direction] += 1

    def started(self, server_round: int, cohort: Sequence[int]) -> None:
        """Show that a round begins."""
        self._done = 0
        rounds = self._config.num_rounds
        self.run.append(
            {"kind": "started", "round": server_round, "rounds": rounds, "cohort_size": len(cohort)}
        )
        self._progress.round_started(server_round, rounds, len(cohort))

    def client(self, record: dict[str, Any]) -> None:
        """Keep one client's training record."""
        self.run.append(record)
        self._done += 1
        self._progress.clients_done(self._done)

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """Keep and show that a client's reply is missing or was dropped."""
        self.run.append(
            {
                "kind": "failure",
                "round": server_round,
                "partition_id": partition_id,
                "reason": reason,
            }
        )
        self._progress.note(f"round {server_round}: client {partition_id} is left out: {reason}")

    def contributed(self, server_round: int, contribution: Contribution) -> None:
        """Keep one client's update; it counts when its round is complete."""
        if self._ledger is None:
            self._ledger = Ledger.create(
                self.run.path / LEDGER,
                size=contribution.update.size,
                retention=self._config.unlearning.retention,
                write=write_bytes,
            )
        self._ledger.record(server_round, contribution)
        self._recorded = server_round

    def evaluated(self, record: dict[str, Any]) -> None:
        """Keep one client's evaluation, or a release of noised values, which must survive a power cut."""
        self.run.append(record)
        if record["kind"] == "privacy":
            self.run.sync()

    def kept(self, kind: str) -> Sequence[dict[str, Any]]:
        """The records of a kind that the run directory has."""
        return self.run.records(kind)

    def finished(self, record: dict[str, Any], checkpoint: Checkpointed) -> None:
        """Keep a round's record and byte counts, then its checkpoint; a kill in between repeats the round."""
        server_round = checkpoint.server_round
        record |= {
            "uplink_bytes": self._bytes["train", "uplink"],
            "downlink_bytes": self._bytes["train", "downlink"],
        }
        self._so_far.update({name: record[name] for name in DIRECTIONS})
        record |= {
            **{f"{name}_so_far": self._so_far[name] for name in DIRECTIONS},
            "seconds": time.monotonic() - self._began,
            "server_memory_bytes": peak_memory_bytes(),
        }
        for (kind, direction), count in sorted(self._bytes.items()):
            self.run.append(
                {
                    "kind": "bytes",
                    "round": server_round,
                    "direction": direction,
                    "message": kind,
                    "bytes": count,
                    "messages": self._messages[kind, direction],
                }
            )
        self.run.append(record)
        self.run.sync()
        self._keep_best(record, checkpoint)
        if self._ledger is not None and self._recorded == server_round > 0:
            self._ledger.close(server_round)
        checkpoints.save(
            self.run.checkpoints,
            server_round,
            checkpoint.arrays,
            checkpoint.state,
            keep=self._config.kept_checkpoints,
        )
        self._bytes.clear()
        self._messages.clear()
        self._began = time.monotonic()
        self._progress.round_done(record)
        self.after_round()

    def resume(self, server_round: int) -> None:
        """Forget what was written after a checkpoint; -1 forgets all rounds."""
        self.run.truncate_after(server_round)
        if self._ledger is not None:
            self._ledger.cut(server_round)
        for record in self.run.records("round"):
            self._so_far.update({name: record[name] for name in DIRECTIONS})
            if (score := selection_score(record)) is not None and (
                self.best is None or score > self.best[0]
            ):
                self.best = (score, int(record["round"]))

    def _keep_best(self, record: dict[str, Any], checkpoint: Checkpointed) -> None:
        score = selection_score(record)
        if (
            self._config.selection == "last"
            or score is None
            or (self.best and score <= self.best[0])
        ):
            return
        self.best = (score, checkpoint.server_round)
        checkpoints.save(
            self.run.path / "best",
            checkpoint.server_round,
            checkpoint.arrays,
            checkpoint.state,
            keep=2,
        )


def selection_score(record: dict[str, Any]) -> float | None:
    """How good a round is on validation rows: accuracy, or minus the loss where there are no labels."""
    if "validation_accuracy" in record:
        return float(record["validation_accuracy"])
    return -float(record["validation_loss"]) if "validation_loss" in record else None
