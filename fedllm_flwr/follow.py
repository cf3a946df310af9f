"""Shows a run that goes on in another process, by reading its run directory as it grows."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from fedllm_flwr.runs.progress import Progress


class Follower:
    """Reads new lines of a run's metrics.jsonl and hands them to a progress display.

    Args:
        out_dir: The run directory; it may not exist yet.
        verbose: Also show where the run directory is.
    """

    def __init__(self, out_dir: Path, *, verbose: bool = False) -> None:
        self._metrics = out_dir / "metrics.jsonl"
        self._offset = self._metrics.stat().st_size if self._metrics.exists() else 0
        self._progress = Progress()
        self._clients = 0
        self.has_stopped = False
        self._verbose = verbose
        self._out_dir = out_dir

    def __enter__(self) -> "Follower":
        """Start the display."""
        self._progress.__enter__()
        if self._verbose:
            print(f"run directory: {self._out_dir}", file=sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        self._progress.__exit__(kind, error, traceback)

    def look(self) -> None:
        """Show what has been written since the last look. A resumed run's file shrinks first; then it starts over."""
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as lines:
            size = lines.seek(0, 2)
            if size < self._offset:
                self._offset = size
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._show(json.loads(line))

    def finished(self, summary: dict[str, Any]) -> None:
        """Show the final figures."""
        self._progress.finished(summary)

    def _show(self, record: dict[str, Any]) -> None:
        kind = record.get("kind")
        if kind == "started":
            self._clients = 0
            self._progress.round_started(record["round"], record["rounds"], record["cohort_size"])
        elif kind == "client":
            self._clients += 1
            self._progress.clients_done(self._clients)
        elif kind == "round":
            self._progress.round_done(record)
        elif kind == "event":
            self.has_stopped = self.has_stopped or record["text"].startswith("stopped: ")
            self._progress.note(record["text"])
        elif kind == "failure":
            self._progress.note(
                f"round {record['round']}: client {record['partition_id']} is left out: {record['reason']}"
            )
