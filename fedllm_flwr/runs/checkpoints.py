"""Checkpoints that survive a kill at any moment and say so when they were damaged.

```
checkpoints/round-0003/arrays.safetensors    named arrays
                       state.json            everything else a resume needs
                       sha256                digests of the two, as `sha256sum --check` reads them
```
A checkpoint is written into a temporary folder, flushed, and renamed: under its own name it is whole from the first
moment. What a disk does to it later, the digests tell.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.runs.atomic import sync_folder

ARRAYS, STATE, DIGESTS = "arrays.safetensors", "state.json", "sha256"
NAME = re.compile(r"round-(\d{4,})")
TEMPORARY = re.compile(r"\.tmp-(\d+)-.*")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round, as :func:`save` was given it."""

    server_round: int
    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


def save(
    folder: Path,
    server_round: int,
    arrays: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    *,
    keep: int = 3,
) -> Path:
    """Write the checkpoint of a round and forget the oldest ones.

    A checkpoint of the same round is replaced. Only one process may save into a folder.

    Args:
        folder: The checkpoints folder of a run; made when absent.
        server_round: The round that the state belongs to; 0 is before the first.
        arrays: Named arrays of any shape and of the dtypes that safetensors knows; bits are kept.
        state: Must come back from JSON as it went in: text keys, lists rather than tuples, finite numbers.
        keep: How many newest checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: ``keep`` is below 1, or the state changes when it goes through JSON; nothing is written.
        TypeError: The state holds a value that JSON has no type for; nothing is written.
        RunStoppedError: The disk is full or broken; the checkpoints before are as they were.
    """
    if keep < 1:
        raise ValueError(f"checkpoints: keep is {keep}: expected at least 1")
    files = {ARRAYS: _pack(arrays), STATE: _state_text(state).encode()}
    files[DIGESTS] = "".join(
        f"{_digest(content)}  {name}\n" for name, content in files.items()
    ).encode()
    target = folder / f"round-{server_round:04d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = _temporary(folder)
        for name, content in files.items():
            _write(temporary / name, content)
        sync_folder(temporary)
    except OSError as error:
        if folder.is_dir():
            _remove_leftovers(folder)
        raise RunStoppedError(
            f"checkpoint {target.name}: expected to write to {folder}, got: {error.strerror}; those before are whole"
        ) from error
    if target.exists():
        _remove(target)
    os.rename(temporary, target)
    sync_folder(folder)
    for _, old in _saved(folder)[keep:]:
        _remove(old)
    return target


def latest(folder: Path, warn: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest checkpoint that is whole.

    Folders that a killed process left half-written are removed on the way.

    Args:
        folder: The checkpoints folder of a run; may be absent.
        warn: Called with one line for each damaged checkpoint that was passed over.

    Returns:
        None when there is no whole checkpoint.
    """
    if not folder.is_dir():
        return None
    _remove_leftovers(folder)
    for server_round, path in _saved(folder):
        try:
            return _load(server_round, path)
        except (OSError, ValueError, SafetensorError) as error:
            warn(f"checkpoint {path.name} is damaged and is passed over: {error}")
    return None


def saved_rounds(folder: Path) -> tuple[int, ...]:
    """The rounds that a checkpoints folder has something of, rising; whether it is whole, :func:`at` tells."""
    return tuple(sorted(r for r, _ in _saved(folder))) if folder.is_dir() else ()


def at(folder: Path, server_round: int) -> Checkpoint | None:
    """The checkpoint of a round; None when there is none, or it is damaged."""
    path = folder / f"round-{server_round:04d}"
    try:
        return _load(server_round, path)
    except (OSError, ValueError, SafetensorError):
        return None


def _load(server_round: int, path: Path) -> Checkpoint:
    """Read and verify; a ValueError or OSError names what is damaged."""
    digests: dict[str, str] = {}
    for line in (path / DIGESTS).read_text().splitlines():
        digest, name = line.split("  ", 1)
        digests[name] = digest
    contents = {}
    for name in (ARRAYS, STATE):
        contents[name] = (path / name).read_bytes()
        got, expected = _digest(contents[name]), digests.get(name)
        if got != expected:
            raise ValueError(f"{name} has SHA-256 {got[:12]}…, expected {str(expected)[:12]}…")
    return Checkpoint(server_round, parse_arrays(contents[ARRAYS]), json.loads(contents[STATE]))


def _pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    # safetensors stores the buffer as it lies in memory, so a transposed view would come back scrambled.
    return pack_arrays({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})


def _state_text(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, indent=1, allow_nan=False)
    back = json.loads(text)
    for key, value in state.items():
        if back.get(key) != value:
            raise ValueError(
                f"checkpoint state: {key!r} does not come back from JSON as it went in: {value!r:.60}"
            )
    return text


def _saved(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by round, newest first."""
    found = ((NAME.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return sorted(((int(match[1]), entry) for match, entry in found if match), reverse=True)


def _temporary(folder: Path) -> Path:
    """A new folder whose name tells which process works in it."""
    return Path(tempfile.mkdtemp(prefix=f".tmp-{os.getpid()}-", dir=folder))


def _remove_leftovers(folder: Path) -> None:
    for path in _leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(folder: Path) -> Iterator[Path]:
    """Temporary folders that nobody works in: this process is not saving now, and the others are gone."""
    for entry in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(entry.name)
        if match and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
            yield entry


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Take a checkpoint away in one step: renamed first, so that a kill leaves no half of it under its name."""
    temporary = _temporary(path.parent)
    os.rename(path, temporary / path.name)
    shutil.rmtree(temporary)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
