"""Files that are either the old one or the new one, never a half-written one.

A reader, or a process killed at any moment, sees the content before or after a write. The new content is on the
disk before the name points at it (fsync, then rename, then fsync of the folder), so a power cut keeps the promise too.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to the disk: a rename is durable only after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step; its folder must exist.

    Args:
        path: The file. A file of that name is replaced; its readers keep the old content.
        content: All of the new content.

    Raises:
        OSError: The folder is absent, full or not writable; the old file is untouched and no leftover stays.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            # mkstemp makes the file private; what a run leaves behind is as readable as any other new file.
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text (UTF-8) in one step; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step, indented, with keys in the order given; see :func:`plain` for its values."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value with JSON's own types only.

    NumPy scalars become Python numbers, tuples become lists, paths become text, and a number that is not finite
    becomes null: JSON has no NaN, and readers of other languages refuse a file that holds one.

    Args:
        value: Scalars, text, None, and mappings and sequences of them.

    Raises:
        TypeError: A value of any other type, such as an array; names the type.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"a {type(value).__name__} cannot be written as JSON: expected scalars, text, lists, mappings"
    )


def _umask() -> int:
    """This process's umask; reading it means setting it, so it is set back at once."""
    current = os.umask(0o077)
    os.umask(current)
    return current
