"""A run directory: the only product of a run, and what every later action reads.

```
manifest.json    what was asked for and where it ran; written once, before anything else
metrics.jsonl    one JSON record per line, appended as things happen
summary.json     the final figures, one flat object; present only when the run finished
checkpoints/     see `checkpoints`
```
One process writes a run directory; any number may read it meanwhile.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.runs.atomic import plain, sync_folder, write_bytes, write_json

MANIFEST, METRICS, SUMMARY = "manifest.json", "metrics.jsonl", "summary.json"


class RunDirectory:
    """One run's folder and its manifest; make one with :meth:`create` or :meth:`open`.

    Attributes:
        path: The folder.
        manifest: What :meth:`create` was given, as read back from JSON.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._tail_is_whole = False

    @classmethod
    def create(cls, path: str | Path, manifest: Mapping[str, Any]) -> "RunDirectory":
        """Start a run directory; other files may already lie in the folder, another run may not.

        Args:
            path: The folder; made with its parents when absent.
            manifest: JSON-able facts. Readers know ``experiment``, ``config`` (nested), ``fingerprint``, ``overrides``,
                ``command`` and ``environment`` (see :mod:`fedllm_flwr.runs.environment`); all are optional.

        Raises:
            ConfigError: The folder already holds a run.
        """
        folder = Path(path)
        if (folder / MANIFEST).exists():
            raise ConfigError(
                f"{folder} already holds a run: expected a new folder; resume it or name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, manifest)
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Open an existing run directory, finished or not.

        Raises:
            ConfigError: The folder is absent or holds no readable manifest; nothing is written.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            found = "there is no such folder" if not folder.is_dir() else f"it holds no {MANIFEST}"
            raise ConfigError(f"{folder} is not a run directory: {found}") from None
        except ValueError as error:
            raise ConfigError(
                f"{folder} is not a run directory: {MANIFEST} is not JSON ({error})"
            ) from None
        if not isinstance(manifest, dict):
            raise ConfigError(f"{folder} is not a run directory: {MANIFEST} holds no object")
        return cls(folder, manifest)

    @property
    def checkpoints(self) -> Path:
        """The folder that :mod:`fedllm_flwr.runs.checkpoints` works in."""
        return self.path / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end, that is, wrote its summary."""
        return (self.path / SUMMARY).exists()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record to metrics.jsonl: one line, one write, visible to readers on return.

        A number that is not finite is stored as null. What a killed process left of a last line is cut off first,
        so that a new record is never glued to it.

        Args:
            record: JSON-able, with a ``kind``; ``round`` where the record belongs to one.

        Raises:
            TypeError: A value that JSON cannot hold; nothing is written.
        """
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        metrics = self.path / METRICS
        if not self._tail_is_whole:
            _cut_torn_tail(metrics)
            self._tail_is_whole = True
        handle = os.open(metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(handle, line) != len(line):
                self._tail_is_whole = False
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, a record was written in part")  # fmt: skip
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, so that it survives a power cut; once a round is often enough."""
        if (self.path / METRICS).exists():
            handle = os.open(self.path / METRICS, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            sync_folder(self.path)

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records in the order written, without a torn last line.

        Args:
            kind: Only records of this kind; all when None.

        Raises:
            DataError: A line other than the last is not a JSON object; names file and line.
        """
        records = []
        lines = _lines(self.path / METRICS)
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None and number < len(lines):
                raise DataError(
                    f"{self.path / METRICS}, line {number}: expected one JSON object, got {line[:40]!r}"
                )
            if record is not None and kind in (None, record.get("kind")):
                records.append(record)
        return records

    def truncate_after(self, server_round: int) -> None:
        """Forget what came after a round, in one step: for a resume from that round's checkpoint.

        Damaged lines go too, wherever they are; records that belong to no round stay.

        Args:
            server_round: The last round to keep; 0 keeps what was measured before the first one, -1 no round at all.
        """
        lines = _lines(self.path / METRICS)
        kept = [line for line in lines if _belongs(_parse(line), server_round)]
        if kept != lines:
            write_bytes(self.path / METRICS, b"".join(line + b"\n" for line in kept))
        self._tail_is_whole = False

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures; from then on the run counts as finished.

        Args:
            summary: Flat: text, booleans and finite numbers. A None says that the figure does not apply: it is left
                out, never written as null or zero.

        Raises:
            ValueError: A nested value, or a number that is not finite; names the key, and writes nothing.
        """
        flat = {key: _flat(key, value) for key, value in summary.items() if value is not None}
        write_json(self.path / SUMMARY, flat)

    def summary(self) -> dict[str, Any]:
        """The final figures; empty while the run is not finished.

        Raises:
            DataError: The file is not a JSON object.
        """
        try:
            figures = json.loads((self.path / SUMMARY).read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DataError(
                f"{self.path / SUMMARY}: expected one JSON object, got {error}"
            ) from None
        if not isinstance(figures, dict):
            raise DataError(
                f"{self.path / SUMMARY}: expected one JSON object, got {type(figures).__name__}"
            )
        return figures


def _lines(path: Path) -> list[bytes]:
    """The lines of a file that may be absent; a last one without its newline is given as torn: not parsable."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    *whole, tail = content.split(b"\n")
    # A torn line may happen to be valid JSON (`12` of `123`); the missing newline is what tells.
    return [*whole, b"torn: " + tail] if tail else whole


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _belongs(record: dict[str, Any] | None, server_round: int) -> bool:
    return record is not None and (record.get("round") is None or record["round"] <= server_round)


def _cut_torn_tail(path: Path) -> None:
    """Drop everything after the last newline, in place."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _flat(key: str, value: Any) -> str | bool | int | float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"summary: {key} is {value}: expected a finite number; leave it out when there is none"
        )
    if not isinstance(value, str | bool | int | float):
        raise ValueError(
            f"summary: {key} is a {type(value).__name__}: expected text, a boolean or a number"
        )
    return value
