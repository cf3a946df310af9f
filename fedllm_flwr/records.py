"""What crosses the wire: every key, every dtype, and the count of every byte.

A message carries one ConfigRecord ``instruction`` (or ``answer`` in a reply), and at most one ArrayRecord with **one**
flat array, because in a deployment the number of arrays, not their bytes, is the cost. The record lists the named
parts of that array and its codec. bfloat16 travels as tagged bytes, since Flower refuses the dtype; every codec is
decoded to float32 before anything averages or clips it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.averaging import Delta, LowRank
from fedllm_flwr.errors import WireError
from fedllm_flwr.models.adapters import LayerShape

INSTRUCTION = "instruction"
ANSWER = "answer"
ARRAYS = "arrays"
METRICS = "metrics"
FLAT = "flat"
NUM_EXAMPLES = "num-examples"

TRAIN = "train"
EVALUATE = "evaluate"
DESCRIBE = "query.describe"

POOLED = -1
"""The partition id that stands for all clients' rows together (the centralised baseline, simulation only)."""

_STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}

Parts = Mapping[str, np.ndarray]


def encode_values(values: np.ndarray, codec: str) -> Array:
    """Turn a flat float32 array into a Flower Array.

    Args:
        values: float32 [n].
        codec: ``float32``, ``float16`` or ``bfloat16`` (round to nearest even, sent as 2n bytes of uint8).

    Raises:
        WireError: A finite value does not fit the codec's range (float16 holds magnitudes up to 65504).
    """
    if codec == "bfloat16":
        bits = values.astype(np.float32, copy=False).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
        return Array(kept.view(np.uint8))
    with np.errstate(over="ignore"):
        stored = values.astype(_STORAGE[codec], copy=False)
    if codec == "float16" and np.isinf(stored).any() and np.isfinite(values).all():
        largest = float(np.abs(values).max())
        raise WireError(
            f"codec float16: expected magnitudes <= 65504, got {largest:g}; use bfloat16 or float32"
        )
    return Array(stored)


def decode_values(array: Array, codec: str) -> np.ndarray:
    """Turn a Flower Array back into float32 [n].

    Raises:
        WireError: The codec is unknown, or the array's dtype or shape is not what the codec sends.
    """
    if codec not in _STORAGE:
        raise WireError(f"codec: expected one of {sorted(_STORAGE)}, got {codec!r}")
    values = array.numpy()
    expected = np.uint8 if codec == "bfloat16" else _STORAGE[codec]
    if values.ndim != 1 or values.dtype != expected:
        raise WireError(
            f"codec {codec}: expected a flat {np.dtype(expected)} array, got {values.dtype} {values.shape}"
        )
    if codec == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _content(key: str, body: Mapping[str, Any], parts: Parts, codec: str) -> RecordDict:
    """One ConfigRecord and, if there is anything to carry, one flat array."""
    spec = [[name, int(values.size)] for name, values in parts.items()]
    record = {
        "package-version": __version__,
        "body": json.dumps(body),
        "parts": json.dumps(spec),
        "codec": codec,
    }
    content = RecordDict({key: ConfigRecord(record)})  # type: ignore[arg-type, dict-item]
    if spec:
        flat = np.concatenate([np.ravel(values) for values in parts.values()])
        content[ARRAYS] = ArrayRecord({FLAT: encode_values(flat, codec)})
    return content


def instruction(body: Mapping[str, Any], parts: Parts, codec: str) -> RecordDict:
    """Content of a message from server to node.

    Args:
        body: JSON-serialisable instruction.
        parts: Named flat float32 arrays; they travel as one array.
        codec: See :func:`encode_values`.
    """
    return _content(INSTRUCTION, body, parts, codec)


def with_body(content: RecordDict, body: Mapping[str, Any]) -> RecordDict:
    """The same arrays (shared, not copied) under another body: a round's messages differ in little."""
    record = dict(content[INSTRUCTION])
    record["body"] = json.dumps(body)
    copy = RecordDict({INSTRUCTION: ConfigRecord(record)})  # type: ignore[arg-type, dict-item]
    if ARRAYS in content:
        copy[ARRAYS] = content[ARRAYS]
    return copy


def answer(body: Mapping[str, Any], parts: Parts, codec: str, num_examples: int) -> RecordDict:
    """Content of a reply from node to server; ``num_examples`` is there for Flower's own tools."""
    content = _content(ANSWER, body, parts, codec)
    content[METRICS] = MetricRecord({NUM_EXAMPLES: num_examples})
    return content


def read(message: Message, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the body and the named parts of a message.

    Args:
        message: A message or reply that carries content.
        key: ``INSTRUCTION`` or ``ANSWER``.

    Returns:
        The body, and float32 [n] arrays by name.

    Raises:
        WireError: The other side runs another version of this package, or the content does not decode.
    """
    if key not in message.content:
        raise WireError(f"message: expected a record {key!r}, got {sorted(message.content)}")
    record = message.content[key]
    theirs = record.get("package-version")
    if theirs != __version__:
        raise WireError(
            f"package version: this side runs {__version__}, the other side {theirs}; install the same one"
        )
    try:
        body = json.loads(record["body"])
        spec = [(str(name), int(size)) for name, size in json.loads(record["parts"])]
        codec = record["codec"]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"message: the record {key!r} does not decode: {error}") from error
    if not spec:
        return body, {}
    arrays = message.content.array_records.get(ARRAYS)
    if arrays is None or list(arrays) != [FLAT]:
        raise WireError(
            f"message: expected one array {FLAT!r}, got {list(arrays) if arrays is not None else 'none'}"
        )
    flat = decode_values(arrays[FLAT], codec)
    total = sum(size for _, size in spec)
    if any(size < 0 for _, size in spec) or total != flat.size:
        raise WireError(f"message: the parts claim {total} values, the array holds {flat.size}")
    parts, offset = {}, 0
    for name, size in spec:
        parts[name] = flat[offset : offset + size]
        offset += size
    return body, parts


def read_body(message: Message) -> dict[str, Any]:
    """The body of a message alone, without decoding its array."""
    return json.loads(message.content[INSTRUCTION]["body"])


def serialized_bytes(message: Message) -> int:
    """Size of a message as Flower serialises it: the message, its records, arrays and array chunks, headers included.

    Serialising leaves views on an array's memory in the array, and then it can no longer be pickled; so this counts
    a twin that shares the memory.
    """
    content = None
    if message.has_content():
        content = RecordDict()
        for name, record in message.content.items():
            content[name] = record
            if isinstance(record, ArrayRecord):
                content[name] = ArrayRecord(
                    {key: Array(a.dtype, a.shape, a.stype, a.data) for key, a in record.items()}
                )
    error = message.error if message.has_error() else None
    twin = Message(content=content, error=error, metadata=message.metadata)  # type: ignore[call-overload]

    def size(node: Any) -> int:
        return len(node.deflate()) + sum(size(child) for child in (node.children or {}).values())

    return size(twin)


def pack_delta(delta: Delta) -> tuple[np.ndarray, dict[str, int]]:
    """Flatten a carried delta: layers by name, left [o, R] before right [R, i].

    Returns:
        float32 [n], and the rank of each layer.
    """
    ranks = {name: int(delta[name].left.shape[1]) for name in sorted(delta)}
    pieces = [np.ravel(part) for name in ranks for part in (delta[name].left, delta[name].right)]
    return np.concatenate(pieces).astype(np.float32, copy=False) if pieces else np.zeros(
        0, np.float32
    ), ranks


def unpack_delta(
    flat: np.ndarray, ranks: Mapping[str, int], shapes: Sequence[LayerShape]
) -> dict[str, LowRank]:
    """Undo :func:`pack_delta`; the matrices are views on ``flat``.

    Raises:
        WireError: A layer is unknown, or the sizes do not add up.
    """
    known = {shape.name: shape for shape in shapes}
    delta, offset = {}, 0
    for name, rank in ranks.items():
        if name not in known:
            raise WireError(f"carried delta: unknown layer {name!r}")
        rows, columns = known[name].out_features, known[name].in_features
        left = flat[offset : offset + rows * rank].reshape(rows, -1)
        offset += rows * rank
        right = flat[offset : offset + rank * columns].reshape(-1, columns)
        offset += rank * columns
        delta[name] = LowRank(left, right)
    if offset != flat.size:
        raise WireError(
            f"carried delta: the ranks claim {offset} values, the array holds {flat.size}"
        )
    return delta


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash of named arrays: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(
            json.dumps([name, str(arrays[name].dtype), list(arrays[name].shape)]).encode()
        )
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
