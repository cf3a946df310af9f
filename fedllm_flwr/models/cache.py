"""The user's cache of models in their compute dtype: written once, checked at each use, mapped by every worker.

Weights are shared between processes only if the file on disk already has the dtype that is computed in; a
cast at load time would give each process a private copy. A GGUF file also takes half a minute to
dequantise. So both are done once.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock

from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.progress import StepReport
from fedllm_flwr.models.sources import WeightSource, digest, find_source, stored_dtype

CHECKSUMS = "checksums.json"


def cache_root() -> Path:
    """Where converted models lie, under ``$FEDLLM_CACHE``, else ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    base = os.environ.get("FEDLLM_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fedllm_flwr" / "models"


def converted(ref: ModelRef, dtype: str, *, full_check: bool = False) -> Path:
    """A folder with the model's weights in one dtype, as safetensors, and its tokenizer.

    A checkpoint that already is in the dtype is used where it lies. Else the converted copy is taken from
    the cache; it is made first if it is absent or damaged. Any number of processes may call this at once:
    one converts, the others wait.

    Args:
        ref: Any model but a built one.
        dtype: float32, bfloat16 or float16.
        full_check: Read and compare the whole copy, instead of trusting files whose size and modification time are
            unchanged since they were last compared.

    Returns:
        The folder.

    Raises:
        AssetError: The model's source is absent or unreadable, or the cache cannot be written.
    """
    source = find_source(ref)
    if source.kind == "checkpoint" and stored_dtype(source.folder) == dtype:
        return source.folder
    folder = cache_root() / _folder_name(ref, dtype, source)
    if is_intact(folder, full_check=full_check):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not is_intact(folder, full_check=True):
                _make(ref, dtype, source, folder)
    except OSError as error:
        raise AssetError(
            f"model cache {folder.parent}: {error}; set FEDLLM_CACHE to another folder"
        ) from error
    return folder


def is_intact(folder: Path, *, full_check: bool = False) -> bool:
    """Whether a converted copy is complete and unchanged.

    Args:
        folder: A folder that :func:`converted` made.
        full_check: As in :func:`converted`.

    Returns:
        False also for a folder that does not exist.
    """
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        facts = {name: _facts(folder / name) for name in recorded}
        if not facts or any(recorded[name]["size"] != facts[name]["size"] for name in facts):
            return False
        if any(set(recorded[name]) != {"size", "mtime_ns", "sha256"} for name in facts):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    touched = [name for name in recorded if recorded[name]["mtime_ns"] != facts[name]["mtime_ns"]]
    if any(
        digest([folder / name]) != recorded[name]["sha256"]
        for name in (recorded if full_check else touched)
    ):
        return False
    if touched:  # same content under a new time, for example after a copy: remember, so that it is read only once
        _write_checksums(folder, {name: {**recorded[name], **facts[name]} for name in recorded})
    return True


def _folder_name(ref: ModelRef, dtype: str, source: WeightSource) -> str:
    name = ref.hub_id.replace("/", "--") or Path(ref.path).name or ref.name
    return f"{name}-{dtype}-{source.fingerprint[:8]}-transformers-{transformers.__version__}"


def _make(ref: ModelRef, dtype: str, source: WeightSource, folder: Path) -> None:
    """Convert into a temporary folder and rename it, while the caller holds the lock."""
    from fedllm_flwr.models.convert import (
        STEPS,
        convert,
    )  # transformers' model code takes seconds to import

    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of processes that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    size = source.size_bytes / 2**20
    title = f"model {ref.label}: converting {size:,.0f} MiB to {dtype} in {folder.parent} (once, up to a minute or two)"
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        with StepReport(title, STEPS) as report:
            convert(source, dtype, work, report)
            names = sorted(file.name for file in work.iterdir())
            _write_checksums(
                work,
                {name: {**_facts(work / name), "sha256": digest([work / name])} for name in names},
            )
        work.chmod(0o755)  # a cache baked into an image may be read by another user
        for file in work.iterdir():
            file.chmod(0o644)
        if folder.exists():
            folder.rename(work.with_name(f"{work.name}-damaged"))
        work.rename(folder)
    finally:
        for leftover in folder.parent.glob(f"{work.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _facts(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _write_checksums(folder: Path, record: dict[str, Any]) -> None:
    """Write the record; a folder that is not ours to write keeps its old one, which only costs a comparison."""
    temporary = folder / f"{CHECKSUMS}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        temporary.replace(folder / CHECKSUMS)
    except PermissionError:
        return
