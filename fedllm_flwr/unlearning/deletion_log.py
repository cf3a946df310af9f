"""A log of deletions that cannot be changed unnoticed: each entry names the hash of the one before it and is signed.

One JSON object a line:

    {"body": {...}, "index": 0, "previous": "<sha-256 of the line before>", "time": "...", "signature": "<hex>"}

The signature (Ed25519) is over everything else in the line. An entry that was edited, deleted, moved or put in between
is found by whoever has the public key. Lines cut off at the *end* leave a shorter log that is whole in itself, so the
head, which is the number of entries and the last hash, belongs somewhere else too: the certificate of each removal
quotes it, and the client that asked has that certificate.

The log names who was removed and when. It holds nothing that was learned from anybody.

Source:
    Haber and Stornetta 1991, How to time-stamp a digital document, section 5.1 (linking); RFC 8032 (Ed25519).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedllm_flwr.errors import ConfigError, VerificationError

KEY_VARIABLE = "FEDLLM_DELETION_KEY"
"""Environment variable that may hold the private key, as PEM."""

START = "0" * 64
"""The hash before the first entry."""


@dataclass(frozen=True)
class Head:
    """The state of a log, to be kept elsewhere.

    Attributes:
        entries: How many it has.
        sha256: Hash of the last line, in hexadecimal digits.
    """

    entries: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One deletion.

    Attributes:
        index: Its place, from 0.
        time: When, as text that the caller chose (ISO 8601, UTC).
        body: What was done: client, method, run, outcome and the like.
    """

    index: int
    time: str
    body: dict[str, Any]


def read_private_key(path: Path | None, environment: Mapping[str, str]) -> Ed25519PrivateKey:
    """The signing key, from a file or else from the environment.

    Args:
        path: A PEM file (PKCS #8, not encrypted), as `openssl genpkey -algorithm ed25519` writes it. None to take
            the text of the variable ``FEDLLM_DELETION_KEY``.
        environment: The process's environment.

    Raises:
        ConfigError: There is no key, or it is not an Ed25519 key; the message holds nothing of it.
    """
    source = f"{path}" if path else KEY_VARIABLE
    try:
        text = path.read_bytes() if path else environment[KEY_VARIABLE].encode()
    except (OSError, KeyError):
        raise ConfigError(
            f"deletion log: expected a private key in {source}, got nothing that can be read"
        ) from None
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"deletion log: expected an Ed25519 private key as PEM in {source}, got something else"
        )
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The key to verify with, from a PEM file.

    Raises:
        ConfigError: The file cannot be read or holds no Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(
            f"deletion log: expected an Ed25519 public key as PEM in {path}, got something else"
        )
    return key


def append(
    path: Path,
    body: Mapping[str, Any],
    *,
    time: str,
    key: Ed25519PrivateKey,
    write: Callable[[Path, bytes], None],
) -> Head:
    """Add an entry, after a look whether those before it are whole.

    The file is replaced in one step, so that a process killed meanwhile leaves no half line. Logs are short.

    Args:
        path: The log; made when absent.
        body: What was done; must come back from JSON as it went in.
        time: When, ISO 8601 in UTC.
        key: Signs the entry.
        write: Replaces a file in one step, as :func:`fedllm_flwr.runs.atomic.write_bytes` does.

    Returns:
        The new head, for the certificate.

    Raises:
        VerificationError: The log is broken; nothing is written.
        ConfigError: The body does not come back from JSON as it went in; nothing is written.
    """
    entries = verify(path, key.public_key()) if path.exists() else ()
    before = path.read_bytes() if entries else b""
    previous = _last_hash(before)
    signed = {"body": dict(body), "index": len(entries), "previous": previous, "time": time}
    try:
        text = _text(signed)
        same = json.loads(text) == signed
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError("deletion log: expected a body of plain JSON values, got others")
    line = _text(signed | {"signature": key.sign(text.encode()).hex()}).encode()
    write(path, before + line + b"\n")
    return Head(len(entries) + 1, hashlib.sha256(line).hexdigest())


def verify(
    path: Path, public_key: Ed25519PublicKey, *, head: Head | None = None
) -> tuple[Entry, ...]:
    """Read a log and check every link and every signature.

    Args:
        path: The log.
        public_key: Of who signs; must come from elsewhere than the log.
        head: A head that was quoted elsewhere: the log must still hold it, and may have grown since. Without one,
            lines cut off at the end are not noticed.

    Returns:
        The entries, in order.

    Raises:
        VerificationError: Names the first broken entry and what is wrong with it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VerificationError(f"deletion log {path.name}: cannot be read: {error}") from None
    lines = content.split(b"\n")
    if lines.pop() != b"":
        raise VerificationError(
            f"deletion log: entry {len(lines)}: expected a whole line, got a part"
        )
    entries, hashes = [], [START]
    for index, line in enumerate(lines):
        entries.append(_checked(index, line, hashes[-1], public_key))
        hashes.append(hashlib.sha256(line).hexdigest())
    if head and (len(entries) < head.entries or hashes[head.entries] != head.sha256):
        broken = min(len(entries), head.entries - 1)
        found = f"{hashes[head.entries][:12]}…" if head.entries < len(hashes) else "no such entry"
        raise VerificationError(
            f"deletion log: entry {broken}: expected {head.entries} entries up to hash "
            f"{head.sha256[:12]}…, got {len(entries)} entries and {found}"
        )
    return tuple(entries)


def _checked(index: int, line: bytes, previous: str, public_key: Ed25519PublicKey) -> Entry:
    who = f"deletion log: entry {index}"
    try:
        fields = json.loads(line)
        signature = bytes.fromhex(fields.pop("signature"))
        entry = Entry(fields["index"], fields["time"], fields["body"])
        place = (fields["index"], fields["previous"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise VerificationError(f"{who}: expected a signed entry, got another text") from None
    if _text(fields | {"signature": signature.hex()}).encode() != line:
        raise VerificationError(f"{who}: expected the form in which it was written, got another")
    try:
        public_key.verify(signature, _text(fields).encode())
    except InvalidSignature:
        raise VerificationError(f"{who}: expected a signature of its text, got another") from None
    if place != (index, previous):
        raise VerificationError(
            f"{who}: expected index {index} after hash {previous[:12]}…, "
            f"got index {place[0]} after {str(place[1])[:12]}…"
        )
    return entry


def _last_hash(content: bytes) -> str:
    if not content:
        return START
    return hashlib.sha256(content.rstrip(b"\n").rpartition(b"\n")[2]).hexdigest()


def _text(fields: Mapping[str, Any]) -> str:
    """One form for one content: sorted keys, no blanks."""
    return json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
