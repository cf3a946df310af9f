"""What a client process and the daemon say to each other, over a Unix socket that only their user can open.

Everything travels in frames: four letters, a length, and so many bytes. A conversation has one of each:

    client   hello      JSON: what it runs, and how large context and message are
    daemon   welcome    JSON: empty, or why it does not take the message
    client   context, message
    daemon   outcome    JSON: empty, or the error that handling the message raised
    daemon   context, reply (empty after an error)

Contexts and messages are Flower's own protobuf bytes. Nothing is unpickled, and errors are rebuilt from a closed table.
"""

import hashlib
import json
import os
import socket
import struct
from importlib import metadata
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common import serde  # private: Flower's own bytes of its own objects
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from google.protobuf.message import DecodeError, EncodeError

import fedllm_flwr
from fedllm_flwr import errors
from fedllm_flwr.errors import DaemonError, FedLLMError

LARGEST_BYTES = 2**31 - 1
"""Protobuf's own limit."""
HELLO_BYTES = 2**16
"""Limit of a frame of JSON."""
_HEADER = struct.Struct(">4sQ")
_MAGIC = b"FLLM"
_PEER = struct.Struct("3i")
"""Linux's ``struct ucred``: process, user, group."""
PACKAGES = ("fedllm-flwr", "flwr", "numpy", "torch", "transformers", "peft")
"""Whose versions both sides must share: results are equal to the bit."""
ERRORS: dict[str, type[FedLLMError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, FedLLMError)
}
"""The errors that cross the socket as what they are; every other one becomes a :class:`DaemonError` that names it."""


def send(stream: socket.socket, content: bytes) -> None:
    """Send one frame."""
    stream.sendall(_HEADER.pack(_MAGIC, len(content)))
    stream.sendall(content)


def receive(stream: socket.socket, limit: int, what: str) -> bytes:
    """Receive one frame.

    Args:
        stream: The connection; its timeout is that of a pause within the frame.
        limit: Largest size in bytes; a larger frame is refused before it is read.
        what: For the messages.

    Raises:
        DaemonError: The other side hung up, said something else than frames, or would send too much.
    """
    letters, size = _HEADER.unpack(_exactly(stream, _HEADER.size, what))
    if letters != _MAGIC:
        raise DaemonError(f"{what}: expected a frame, got {letters!r}")
    if size > limit:
        raise DaemonError(f"{what}: expected at most {limit} bytes, got {size}")
    return bytes(_exactly(stream, size, what))


def _exactly(stream: socket.socket, size: int, what: str) -> bytearray:
    content = bytearray(size)
    view, filled = memoryview(content), 0
    while filled < size:
        count = stream.recv_into(view[filled:])
        if not count:
            raise DaemonError(f"{what}: the other side hung up after {filled} of {size} bytes")
        filled += count
    return content


def send_json(stream: socket.socket, content: dict[str, Any]) -> None:
    """Send one frame of JSON; texts in it are cut so that it stays within its limit."""
    cut = {k: v[: HELLO_BYTES // 16] if isinstance(v, str) else v for k, v in content.items()}
    send(stream, json.dumps(cut).encode())


def receive_json(stream: socket.socket, what: str) -> dict[str, Any]:
    """Receive one frame of JSON.

    Raises:
        DaemonError: As in :func:`receive`, or the frame holds no JSON object.
    """
    content = receive(stream, HELLO_BYTES, what)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DaemonError(f"{what}: expected a JSON object, got {content[:40]!r}")
    return found


def context_bytes(context: Context) -> bytes:
    """A node's context as Flower serialises it.

    Raises:
        DaemonError: It is too large for one protobuf message.
    """
    return _bytes(serde.context_to_proto(context), "context")


def message_bytes(message: Message) -> bytes:
    """A message, with content, as Flower serialises it.

    Raises:
        DaemonError: It is too large for one protobuf message.
    """
    return _bytes(serde.message_to_proto(message), "message")


def read_context(content: bytes) -> Context:
    """Undo :func:`context_bytes`.

    Raises:
        DaemonError: The bytes are no context.
    """
    try:
        return serde.context_from_proto(ContextProto.FromString(content))
    except (DecodeError, TypeError, ValueError) as error:
        raise DaemonError(f"context: does not decode: {error}") from error


def read_message(content: bytes) -> Message:
    """Undo :func:`message_bytes`.

    Raises:
        DaemonError: The bytes are no message.
    """
    try:
        return serde.message_from_proto(MessageProto.FromString(content))
    except (DecodeError, TypeError, ValueError) as error:
        raise DaemonError(f"message: does not decode: {error}") from error


def _bytes(proto: Any, what: str) -> bytes:
    try:
        content: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise DaemonError(f"{what}: does not fit into {LARGEST_BYTES} bytes: {error}") from error
    return content


def error_facts(error: Exception) -> dict[str, Any]:
    """An error as the outcome frame carries it."""
    return {"kind": type(error).__name__, "text": str(error)}


def rebuilt(facts: dict[str, Any]) -> FedLLMError:
    """The error of an outcome frame; one that is none of this package's is named in a :class:`DaemonError`."""
    kind, text = str(facts.get("kind", "")), str(facts.get("text", ""))
    return ERRORS[kind](text) if kind in ERRORS else DaemonError(f"{kind}: {text}")


def identity() -> dict[str, str]:
    """What this process runs: versions of packages, and a digest of this package's own code.

    The digest is there because a client process takes its code from what was sent with the run, and the daemon from
    what is installed.
    """
    versions = {name: metadata.version(name) for name in PACKAGES[1:]}
    root = Path(fedllm_flwr.__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(
        p for part in ("fedllm_flwr", "clients") for p in (root / part).rglob("*.py")
    ):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {PACKAGES[0]: fedllm_flwr.__version__, **versions, "code": code.hexdigest()[:16]}


def difference(ours: dict[str, str], theirs: object) -> str:
    """The first thing in which two sides differ; empty where they run the same."""
    found = theirs if isinstance(theirs, dict) else {}
    for name, own in ours.items():
        if found.get(name) != own:
            return f"{name}: the daemon runs {own}, the client {found.get(name, 'none')!s:.40}"
    return ""


def peer_user(stream: socket.socket) -> int:
    """The user id of the process at the other end, as the kernel knows it."""
    content = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(content)[1])


def check_peer(stream: socket.socket) -> None:
    """Talk to nobody but this process's own user.

    Raises:
        DaemonError: The other end belongs to somebody else.
    """
    peer, own = peer_user(stream), os.getuid()
    if peer != own:
        raise DaemonError(f"the process at the other end belongs to user {peer}, expected {own}")
