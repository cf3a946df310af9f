import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedllm_flwr import records
from fedllm_flwr.averaging import LowRank
from fedllm_flwr.codecs import CODECS, FLOAT_CODECS
from fedllm_flwr.errors import WireError
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.models.adapters import LayerShape


@pytest.fixture(autouse=True)
def _identity() -> None:
    LoopbackGrid(lambda message, context: message, 1)


def message(content: RecordDict) -> Message:
    return Message(content, 7, records.TRAIN, group_id="g")


def test_an_array_of_another_dtype_than_its_codec_is_refused() -> None:
    sent = message(records.instruction({}, {"x": np.ones(3, np.float32)}, "float32"))
    for codec, match in (
        ("bfloat16", "expected a flat uint8 array, got float32"),
        ("int8", "expected a flat uint8 array, got float32"),
        ("pickle", "expected one of .*, got 'pickle'"),
    ):
        sent.content[records.INSTRUCTION]["codec"] = codec
        with pytest.raises(WireError, match=match):
            records.read(sent, records.INSTRUCTION)


@pytest.mark.parametrize("codec", [name for name in CODECS if name not in FLOAT_CODECS])
def test_encoded_parts_travel_as_they_are_and_others_whole(codec: str) -> None:
    stored = {"a": np.arange(7, dtype=np.uint8), "b": np.zeros(0, np.uint8)}
    sent = message(records.instruction({}, stored, codec))
    assert records.read_codec(sent, records.INSTRUCTION) == codec
    assert sent.content[records.ARRAYS][records.FLAT].numpy().nbytes == 7
    _, read = records.read(sent, records.INSTRUCTION)
    for name, values in stored.items():
        assert read[name].dtype == np.uint8
        np.testing.assert_array_equal(read[name], values)
    whole = message(records.instruction({}, {"a": np.array([0.1], np.float32)}, codec))
    assert records.read_codec(whole, records.INSTRUCTION) == "float32"
    assert records.read(whole, records.INSTRUCTION)[1]["a"] == np.float32(0.1)


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_encoded_and_plain_parts_never_mix(codec: str) -> None:
    parts = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float32)}
    with pytest.raises(WireError, match=rf"codec {codec}: .* got 1 encoded of 2"):
        records.instruction({}, parts, codec)


@pytest.mark.parametrize("codec", FLOAT_CODECS)
def test_parts_travel_as_one_array(codec: str) -> None:
    parts = {"0/adapter": np.arange(5, dtype=np.float32), "delta": np.ones((2, 3), np.float32)}
    sent = message(records.instruction({"a": [1, 2]}, parts, codec))
    assert [len(r) for r in sent.content.array_records.values()] == [1]
    body, read = records.read(sent, records.INSTRUCTION)
    assert body == {"a": [1, 2]}
    assert list(read) == list(parts)
    for name, values in parts.items():
        np.testing.assert_array_equal(read[name], values.ravel())


def test_another_version_of_the_package_is_an_error_that_shows_both() -> None:
    sent = message(records.instruction({}, {}, "float32"))
    sent.content[records.INSTRUCTION]["package-version"] = "9.9.9"
    with pytest.raises(WireError, match=r"this side runs 0\.1\.0, the other side 9\.9\.9"):
        records.read(sent, records.INSTRUCTION)


def test_a_version_that_is_no_version_is_shown_in_one_short_line() -> None:
    sent = message(records.instruction({}, {}, "float32"))
    sent.content[records.INSTRUCTION]["package-version"] = "9.9\n" + "9" * 500
    with pytest.raises(
        WireError, match=r"the other side 9\.9 9{36}; install the same one$"
    ) as raised:
        records.read(sent, records.INSTRUCTION)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ('[["x", 4]]', "claim 4 values, the array holds 3"),
        ('[["x", -3], ["y", 6]]', "claim 3"),
        ("{", "decode"),
    ],
)
def test_a_spec_that_does_not_fit_its_array_is_refused(parts: str, match: str) -> None:
    sent = message(records.instruction({}, {"x": np.ones(3, np.float32)}, "float32"))
    sent.content[records.INSTRUCTION]["parts"] = parts
    with pytest.raises(WireError, match=match):
        records.read(sent, records.INSTRUCTION)


def test_several_arrays_are_refused() -> None:
    sent = message(records.instruction({}, {"x": np.ones(3, np.float32)}, "float32"))
    ones = Array(np.ones(3, np.float32))
    sent.content[records.ARRAYS] = ArrayRecord({records.FLAT: ones, "more": ones})
    with pytest.raises(WireError, match="expected one array 'flat'"):
        records.read(sent, records.INSTRUCTION)


def test_serialized_bytes_count_the_payload_and_a_small_envelope() -> None:
    small = records.serialized_bytes(
        message(records.instruction({}, {"x": np.ones(1, np.float32)}, "float32"))
    )
    large = records.serialized_bytes(
        message(records.instruction({}, {"x": np.ones(100_001, np.float32)}, "float32"))
    )
    assert 400_000 <= large - small <= 400_000 + 300
    half = records.serialized_bytes(
        message(records.instruction({}, {"x": np.ones(100_001, np.float32)}, "bfloat16"))
    )
    assert 0.49 < half / large < 0.51


def test_a_carried_delta_survives_packing() -> None:
    shapes = [LayerShape("b", 3, 4), LayerShape("a", 2, 5)]
    generator = np.random.default_rng(0)

    def drawn(rows: int, rank: int, columns: int) -> LowRank:
        left = generator.standard_normal((rows, rank), dtype=np.float32)
        return LowRank(left, generator.standard_normal((rank, columns), dtype=np.float32))

    delta = {"b": drawn(4, 2, 3), "a": drawn(5, 0, 2)}
    flat, ranks = records.pack_delta(delta)
    assert records.delta_size(ranks, shapes) == flat.size
    found = records.unpack_delta(flat, ranks, shapes)
    for name in delta:
        np.testing.assert_array_equal(found[name].left, delta[name].left)
        np.testing.assert_array_equal(found[name].right, delta[name].right)
    with pytest.raises(WireError, match="the ranks claim"):
        records.unpack_delta(flat[:-1], {"a": 0, "b": 1}, shapes)
    with pytest.raises(WireError, match="unknown layer 'c'"):
        records.unpack_delta(flat, {"c": 1}, shapes)
    with pytest.raises(WireError, match="unknown layer 'c'"):
        records.delta_size({"c": 1}, shapes)


def test_the_hash_of_arrays_sees_names_values_and_dtypes() -> None:
    one = {"x": np.ones(3, np.float32)}
    assert records.arrays_sha256(one) == records.arrays_sha256({"x": np.ones(3, np.float32)})
    others = [{"y": one["x"]}, {"x": one["x"] + 1e-7}, {"x": one["x"].astype(np.float64)}]
    assert len({records.arrays_sha256(o) for o in [one, *others]}) == 4


def test_counting_bytes_leaves_the_message_picklable() -> None:
    sent = message(records.instruction({}, {"x": np.ones(9, np.float32)}, "float32"))
    twin = pickle.loads(pickle.dumps(sent))  # noqa: S301 - our own bytes
    assert records.serialized_bytes(sent) == records.serialized_bytes(twin)


@pytest.mark.parametrize("codec", FLOAT_CODECS)
@pytest.mark.parametrize("values", [0, 1, 1000, 5 * 2**20 // 4 - 32, 3_000_000])
def test_computed_bytes_are_those_that_flower_serialises(codec: str, values: int) -> None:
    generator = np.random.default_rng(0)  # chunks that are alike travel once
    drawn = generator.standard_normal(values, dtype=np.float32)
    sent = message(records.instruction({"a": "é"}, {"x": drawn} if values else {}, codec))

    def serialised(node: Any) -> int:
        return len(node.deflate()) + sum(serialised(c) for c in (node.children or {}).values())

    assert records.serialized_bytes(sent) == serialised(sent)
