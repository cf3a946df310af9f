"""What crosses the wire: every key, every dtype, and the count of every byte.

A message carries one ConfigRecord ``instruction`` (or ``answer`` in a reply), and at most one ArrayRecord with **one**
flat array, because in a deployment the number of arrays, not their bytes, is the cost. The record lists the named
parts of that array and its codec. float32, float16 and bfloat16 are written and read here. The other codecs need to
know a part's matrices and what it differs from, so their parts come and go as bytes, which clients and strategies
encode and decode. Everything is float32 before anything averages or clips it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm_flwr import __version__
from fedllm_flwr.averaging import Delta, LowRank
from fedllm_flwr.codecs import CODECS, FLOAT_CODECS
from fedllm_flwr.errors import WireError

if TYPE_CHECKING:  # a client process that hands its message to a daemon loads no torch
    from fedllm_flwr.models.shapes import LayerShape

INSTRUCTION = "instruction"
ANSWER = "answer"
ARRAYS = "arrays"
METRICS = "metrics"
FLAT = "flat"
NUM_EXAMPLES = "num-examples"

TRAIN = "train"
EVALUATE = "evaluate"
EXCHANGE = "train.exchange"
SCORE = "evaluate.score"
DESCRIBE = "query.describe"
CALIBRATE = "query.calibrate"
PENDING = "query.pending"
ANSWERS = "query.answers"
EXAMINE = "query.examine"

POOLED = -1
"""The partition id that stands for all clients' rows together (the centralised baseline, simulation only)."""

_CHUNK_BYTES = 5 * 2**20
"""Flower cuts an array's bytes into objects of this size (``FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE``)."""

Parts = Mapping[str, np.ndarray]


def _content(key: str, body: Mapping[str, Any], parts: Parts, codec: str) -> RecordDict:
    """One ConfigRecord and, if there is anything to carry, one flat array."""
    flat = np.concatenate([np.ravel(values) for values in parts.values()] or [np.zeros(0)])
    name = _codec_of(parts, codec)
    record = {
        "package-version": __version__,
        "body": json.dumps(body),
        "parts": json.dumps([[part, int(values.size)] for part, values in parts.items()]),
        "codec": name,
    }
    content = RecordDict({key: ConfigRecord(record)})  # type: ignore[arg-type, dict-item]
    if parts:
        stored = FLOAT_CODECS[name].encode(flat, ((flat.size,),)) if name in FLOAT_CODECS else flat
        content[ARRAYS] = ArrayRecord({FLAT: Array(stored)})
    return content


def _codec_of(parts: Parts, codec: str) -> str:
    """What the parts travel as: a codec that needs shapes has encoded them, or they travel whole as float32.

    Raises:
        WireError: Some parts are encoded and some are not, or they are although the codec carries values.
    """
    encoded = [values.dtype == np.uint8 for values in parts.values()]
    if any(encoded) and (codec in FLOAT_CODECS or not all(encoded)):
        raise WireError(
            f"codec {codec}: expected parts that are all of values or all encoded by it, got {sum(encoded)} encoded "
            f"of {len(encoded)}"
        )
    return codec if codec in FLOAT_CODECS or all(encoded) else "float32"


def instruction(body: Mapping[str, Any], parts: Parts, codec: str) -> RecordDict:
    """Content of a message from server to node.

    Args:
        body: JSON-serialisable instruction.
        parts: Named flat arrays that travel as one: float32, or uint8 where the codec has encoded them.
        codec: A name of ``CODECS``. Parts of float32 travel as float32 under a codec that has to encode them before.
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
        The body, and arrays by name: float32 [n], or uint8 [n] where the codec needs a part's shapes to decode it.

    Raises:
        WireError: The other side runs another version of this package, or the content does not decode.
    """
    if key not in message.content:
        raise WireError(f"message: expected a record {key!r}, got {sorted(message.content)}")
    record: dict[str, Any] = dict(message.content[key])
    theirs = record.get("package-version")
    if theirs != __version__:
        raise WireError(
            f"package version: this side runs {__version__}, the other side {theirs!s:.40}; install the same one"
        )
    try:
        body = json.loads(record["body"])
        spec = [(str(name), int(size)) for name, size in json.loads(record["parts"])]
        codec = record["codec"]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"message: the record {key!r} does not decode: {error}") from error
    if not spec:
        return body, {}
    arrays = message.content.get(ARRAYS)  # `.array_records` would tie the message into a cycle
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [FLAT]:
        raise WireError(
            f"message: expected one array {FLAT!r}, got {list(arrays) if arrays is not None else 'none'}"
        )
    try:
        stored = arrays[FLAT].numpy()
    except (
        TypeError,
        ValueError,
        EOFError,
        OverflowError,
        OSError,
        MemoryError,
        TokenError,
    ) as error:
        # unpickling is refused here too, and a header that promises more than there is
        raise WireError(
            f"message: the array {FLAT!r} does not decode: {type(error).__name__}"
        ) from error
    if not isinstance(stored, np.ndarray):
        raise WireError(f"message: expected one array {FLAT!r}, got an archive")
    flat = _decoded(stored, codec)
    total = sum(size for _, size in spec)
    if any(size < 0 for _, size in spec) or total != flat.size:
        raise WireError(f"message: the parts claim {total} values, the array holds {flat.size}")
    parts, offset = {}, 0
    for name, size in spec:
        parts[name] = flat[offset : offset + size]
        offset += size
    return body, parts


def _decoded(stored: np.ndarray, codec: Any) -> np.ndarray:
    """Values, or the bytes of a codec that needs shapes.

    Raises:
        WireError: The codec is unknown, or the array's dtype or dimensions are not what it sends.
    """
    if codec not in CODECS:
        raise WireError(f"codec: expected one of {sorted(CODECS)}, got {codec!r}")
    if codec in FLOAT_CODECS:
        known = FLOAT_CODECS[codec]
        return known.decode(stored, ((stored.nbytes // known.width,),))
    if stored.ndim != 1 or stored.dtype != np.uint8:
        raise WireError(
            f"codec {codec}: expected a flat uint8 array, got {stored.dtype} {stored.shape}"
        )
    return stored


def read_codec(message: Message, key: str) -> str:
    """The codec of a message's parts, as its record names it; see :func:`read` for the arguments."""
    return str(message.content[key]["codec"])


def read_body(message: Message) -> dict[str, Any]:
    """The body of a message alone, without decoding its array."""
    body: Any = message.content[INSTRUCTION]["body"]
    return json.loads(body)


def serialized_bytes(message: Message) -> int:
    """Size of a message as Flower serialises it: the message, its records, arrays and array chunks, headers included.

    Array sizes are added up, not serialised: Flower would hash and copy every array (2 ms for a 2 MB adapter, more
    than the rest of an exchange), and it leaves views in an array that then can no longer be pickled.

    Source:
        Flower 1.41, ``InflatableObject.deflate``: a header ``<type> <ids of children> <length of body>``, a zero byte,
        and a body that is a JSON object for records and arrays, and the data itself for chunks of up to 5 MiB.
    """
    if not message.has_content():
        return len(message.deflate())
    metadata = message.metadata
    envelope = Message(content=RecordDict(), metadata=metadata)  # type: ignore[call-overload]
    total = len(envelope.deflate()) + _references_bytes("RecordDict", list(message.content))
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            total += _references_bytes("ArrayRecord", list(record))
            total += sum(_array_bytes(array) for array in record.values())
        else:
            total += len(record.deflate())
    return total


def _object_bytes(kind: str, children: int, body: int) -> int:
    """Header and body of one of Flower's objects; a child's id has 64 characters and a separator."""
    return len(f"{kind}  {body}\0") + max(0, 65 * children - 1) + body


def _references_bytes(kind: str, names: list[str]) -> int:
    body = json.dumps(dict.fromkeys(names, "0" * 64))
    return _object_bytes(kind, len(names), len(body))


def _array_bytes(array: Array) -> int:
    """An array and its chunks; equal chunks are one object."""
    view = memoryview(array.data)
    pieces = [view[i : i + _CHUNK_BYTES] for i in range(0, len(view), _CHUNK_BYTES)]
    indices = list(range(len(pieces)))
    if len(pieces) > 1:  # the search for equal ones reads all bytes
        first: dict[memoryview, int] = {}
        indices = [first.setdefault(piece, len(first)) for piece in pieces]
        pieces = list(first)
    spec = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype}
    body = json.dumps({**spec, "arraychunk_ids": indices})
    own = _object_bytes("Array", len(pieces), len(body))
    return own + sum(_object_bytes("ArrayChunk", 0, len(piece)) for piece in pieces)


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


def delta_size(ranks: Mapping[str, int], shapes: Sequence[LayerShape]) -> int:
    """Values of a packed delta; see :func:`unpack_delta` for the arguments.

    Raises:
        WireError: A layer is unknown.
    """
    widths = {shape.name: shape.out_features + shape.in_features for shape in shapes}
    for name in ranks:
        if name not in widths:
            raise WireError(f"carried delta: unknown layer {name!r}")
    return sum(rank * widths[name] for name, rank in ranks.items())


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
