"""Shows a run that goes on in another process, by reading its run directory as it grows."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from fedllm_flwr.runs.progress import Progress


class Follower:
    """Reads new lines of a run's metrics.jsonl and hands them to a progress display.

    Args:
        out_dir: The run directory; it may not exist yet.
    """

    def __init__(self, out_dir: Path) -> None:
        self._metrics = out_dir / "metrics.jsonl"
        found = self._metrics.stat() if self._metrics.exists() else None
        self._offset, self._file = (found.st_size, found.st_ino) if found else (0, 0)
        self._progress = Progress()
        self._clients = 0
        self.has_stopped = False

    def __enter__(self) -> "Follower":
        """Start the display."""
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        self._progress.__exit__(kind, error, traceback)

    def look(self) -> bool:
        """Show what has been written since the last look; a resumed run replaces the file first.

        Returns:
            Whether there was anything.
        """
        if not self._metrics.exists():
            return False
        is_new = False
        with self._metrics.open("rb") as lines:
            size, file = lines.seek(0, 2), os.fstat(lines.fileno()).st_ino
            if size < self._offset or (self._file and file != self._file):
                self._offset = size
            self._file = file
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._show(json.loads(line))
                is_new = True
        return is_new

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
