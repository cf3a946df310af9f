"""Find the files that installed model and data packages carry, without importing those packages.

Importing is avoided on purpose: some of the packages load native libraries or print when imported.
Files are read where they are installed and are never copied into this project.
"""

import hashlib
import importlib.metadata
import sys
from functools import lru_cache
from pathlib import Path

from fedllm_flwr.errors import AssetError

GET_ASSETS = "make assets"
"""The command that installs every package this module may be asked for."""

SHARED_SHA256 = {
    "vaderSentiment-3.3.2.tar.gz": (
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
    ),
}
"""Checksums of the files that are downloaded rather than installed from a hash-pinned wheel."""


def locate(distribution: str, relative_path: str, *, get: str = GET_ASSETS) -> Path:
    """The path of one file of an installed distribution.

    Args:
        distribution: Name of the distribution, as a package index spells it.
        relative_path: The file, relative to the folder that the distribution is installed in.
        get: The command that brings the distribution, for the message.

    Returns:
        An existing file.

    Raises:
        AssetError: The distribution is not installed, or it has no such file.
    """
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(relative_path)))
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(
            f"package {distribution} is not installed; run `{get}` to get it"
        ) from None
    if not path.is_file():
        raise AssetError(
            f"package {distribution} has no file {relative_path}; run `{get}` to repair it"
        )
    return path


def shared_asset(file_name: str) -> Path:
    """The path of a downloaded archive in ``share/fedllm-assets`` of the Python environment.

    A file with a known checksum is verified once in a process.

    Args:
        file_name: Name of the file, without a folder.

    Returns:
        An existing, verified file.

    Raises:
        AssetError: The file is absent, or its checksum is not the expected one.
    """
    path = Path(sys.prefix) / "share" / "fedllm-assets" / file_name
    if not path.is_file():
        raise AssetError(f"data file {file_name} is absent; run `{GET_ASSETS}` to get it")
    if file_name in SHARED_SHA256:
        verify(path, SHARED_SHA256[file_name])
    return path


@lru_cache(maxsize=64)
def verify(path: Path, sha256: str) -> None:
    """Check a file's SHA-256 digest; a file that passed is not read again in this process.

    Args:
        path: An existing file.
        sha256: The expected digest, 64 hexadecimal digits.

    Raises:
        AssetError: The digest differs.
    """
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise AssetError(
            f"{path.name}: expected SHA-256 {sha256}, got {found}; run `{GET_ASSETS}` to repair it"
        )
