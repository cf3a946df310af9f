"""Where the weights of a model lie on this machine, before any conversion.

A source is either one GGUF file, possibly shipped in several pieces, or a folder with a Hugging Face checkpoint.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fedllm_flwr.assets import locate
from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.catalog import ModelRef

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class WeightSource:
    """Weights as they were shipped.

    Attributes:
        kind: ``gguf`` or ``checkpoint``.
        files: The pieces of the GGUF file in order, or every file of the checkpoint that is read.
        fingerprint: Hexadecimal text that changes when the weights change. For packaged models it is the
        digest of the
            content; for the user's own files it covers names, sizes and modification times, since reading
            gigabytes at every start would cost more than loading them.
        sha256: Expected digest of the GGUF file; empty where nobody vouches for one.
    """

    kind: Literal["gguf", "checkpoint"]
    files: tuple[Path, ...]
    fingerprint: str
    sha256: str = ""

    @property
    def folder(self) -> Path:
        """The folder of a checkpoint."""
        return self.files[0].parent

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in self.files)


def find_source(ref: ModelRef) -> WeightSource:
    """Find a model's weights; downloads those of a ``hub`` model that are not on this machine yet.

    Args:
        ref: Any model but a built one.

    Returns:
        The source; its files exist.

    Raises:
        AssetError: A package, folder, file or hub repository is absent, or holds no weights that can be read.
    """
    if ref.entry.source == "packaged":
        pieces = tuple(
            locate(distribution, file, get=ref.entry.get) for distribution, file in ref.entry.pieces
        )
        return WeightSource("gguf", pieces, ref.entry.sha256, ref.entry.sha256)
    if ref.entry.source == "hub":
        return _checkpoint(ref, _download(ref, weights=True))
    path = Path(ref.path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return WeightSource("gguf", (path,), _stat_fingerprint([path]))
    if not path.is_dir():
        raise AssetError(
            f"model path {ref.path}: expected a checkpoint folder or a .gguf file, found neither"
        )
    return _checkpoint(ref, path)


def config_file(ref: ModelRef) -> Path | None:
    """The model's own ``config.json``, found without its weights; None for a GGUF file, which holds its own.

    Raises:
        AssetError: The model is absent or has no configuration.
    """
    if ref.entry.source == "hub":
        return _download(ref, weights=False) / "config.json"
    if ref.entry.source == "packaged" or Path(ref.path).suffix == ".gguf":
        return None
    file = Path(ref.path).expanduser() / "config.json"
    if not file.is_file():
        raise AssetError(f"model path {ref.path}: expected a folder with config.json, found none")
    return file


def stored_dtype(folder: Path) -> str | None:
    """The dtype of a checkpoint's floating-point weights, read from its safetensors headers.

    Returns:
        A dtype's name; None if the folder has no safetensors files or mixes dtypes.
    """
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(
                stream.read(int.from_bytes(stream.read(8), "little"))
            )
        found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    names = found & set(SAFETENSORS_DTYPES)
    return SAFETENSORS_DTYPES[names.pop()] if len(names) == 1 else None


def digest(pieces: Iterable[Path]) -> str:
    """SHA-256 of the concatenation of files."""
    total = hashlib.sha256()
    for piece in pieces:
        with piece.open("rb") as stream:
            while block := stream.read(2**20):
                total.update(block)
    return total.hexdigest()


def _checkpoint(ref: ModelRef, folder: Path) -> WeightSource:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise AssetError(
            f"model {ref.label}: expected *.safetensors or *.bin weights, found none in its folder"
        )
    for needed in ("config.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise AssetError(f"model {ref.label}: expected a checkpoint with {needed}, found none")
    files = (*weights, *sorted(folder.glob("*.json")))
    return WeightSource("checkpoint", files, _stat_fingerprint(files))


def _stat_fingerprint(files: Iterable[Path]) -> str:
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _download(ref: ModelRef, *, weights: bool) -> Path:
    """The local snapshot of a hub repository. A full commit that is already here is taken without asking the hub."""
    patterns = [*TOKENIZER_FILES, "*.safetensors"] if weights else ["config.json"]
    pinned = bool(_COMMIT.fullmatch(ref.revision))
    try:
        if pinned and (folder := _snapshot(ref, patterns, local_only=True)) is not None:
            return folder
        folder = _snapshot(ref, patterns, local_only=False)
        if weights and folder is not None and not list(folder.glob("*.safetensors")):
            folder = _snapshot(ref, [*TOKENIZER_FILES, "*.bin"], local_only=False)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AssetError(f"model hub {ref.hub_id}: cannot be fetched: {reason}") from error
    if folder is None:
        raise AssetError(
            f"model hub {ref.hub_id}: not in the local hub cache, and the hub cannot be reached"
        )
    if not (folder / "config.json").is_file():
        raise AssetError(f"model hub {ref.hub_id}: the repository has no config.json")
    return folder


def _snapshot(ref: ModelRef, patterns: list[str], *, local_only: bool) -> Path | None:
    try:
        found = huggingface_hub.snapshot_download(
            ref.hub_id,
            revision=ref.revision or None,
            allow_patterns=patterns,
            local_files_only=local_only,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(found)
