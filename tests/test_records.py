import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm_flwr import records
from fedllm_flwr.averaging import LowRank
from fedllm_flwr.errors import WireError
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.models.adapters import LayerShape


@pytest.fixture(autouse=True)
def _identity() -> None:
    LoopbackGrid(lambda message, context: message, 1)


def message(content: RecordDict) -> Message:
    return Message(content, 7, records.TRAIN, group_id="g")


FLOATS = arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=False)
)


@given(FLOATS)
def test_bfloat16_rounds_as_torch_does(values: np.ndarray) -> None:
    sent = records.decode_values(records.encode_values(values, "bfloat16"), "bfloat16")
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(sent, expected)


def test_bfloat16_keeps_nan_and_infinity() -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0], dtype=np.float32)
    np.testing.assert_array_equal(
        records.decode_values(records.encode_values(values, "bfloat16"), "bfloat16"), values
    )


@given(FLOATS)
def test_float32_is_exact_and_float16_rounds_as_numpy_does(values: np.ndarray) -> None:
    exact = records.decode_values(records.encode_values(values, "float32"), "float32")
    np.testing.assert_array_equal(exact, values)
    half = records.decode_values(records.encode_values(values, "float16"), "float16")
    np.testing.assert_array_equal(half, values.astype(np.float16).astype(np.float32))


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(WireError, match="65504, got 70000"):
        records.encode_values(np.array([7e4], np.float32), "float16")


def test_an_array_of_another_dtype_than_its_codec_is_refused() -> None:
    with pytest.raises(WireError, match="expected a flat uint8 array, got float32"):
        records.decode_values(records.encode_values(np.ones(3, np.float32), "float32"), "bfloat16")
    with pytest.raises(WireError, match="expected one of"):
        records.decode_values(records.encode_values(np.ones(3, np.float32), "float32"), "pickle")


@pytest.mark.parametrize("codec", records._STORAGE)
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
    found = records.unpack_delta(flat, ranks, shapes)
    for name in delta:
        np.testing.assert_array_equal(found[name].left, delta[name].left)
        np.testing.assert_array_equal(found[name].right, delta[name].right)
    with pytest.raises(WireError, match="the ranks claim"):
        records.unpack_delta(flat[:-1], {"a": 0, "b": 1}, shapes)
    with pytest.raises(WireError, match="unknown layer 'c'"):
        records.unpack_delta(flat, {"c": 1}, shapes)


def test_the_hash_of_arrays_sees_names_values_and_dtypes() -> None:
    one = {"x": np.ones(3, np.float32)}
    assert records.arrays_sha256(one) == records.arrays_sha256({"x": np.ones(3, np.float32)})
    others = [{"y": one["x"]}, {"x": one["x"] + 1e-7}, {"x": one["x"].astype(np.float64)}]
    assert len({records.arrays_sha256(o) for o in [one, *others]}) == 4


def test_counting_bytes_leaves_the_message_picklable() -> None:
    sent = message(records.instruction({}, {"x": np.ones(9, np.float32)}, "float32"))
    twin = pickle.loads(pickle.dumps(sent))  # noqa: S301 - our own bytes
    assert records.serialized_bytes(sent) == records.serialized_bytes(twin)


@pytest.mark.parametrize("codec", records._STORAGE)
@pytest.mark.parametrize("values", [0, 1, 1000, 5 * 2**20 // 4 - 32, 3_000_000])
def test_computed_bytes_are_those_that_flower_serialises(codec: str, values: int) -> None:
    generator = np.random.default_rng(0)  # chunks that are alike travel once
    drawn = generator.standard_normal(values, dtype=np.float32)
    sent = message(records.instruction({"a": "é"}, {"x": drawn} if values else {}, codec))

    def serialised(node: Any) -> int:
        return len(node.deflate()) + sum(serialised(c) for c in (node.children or {}).values())

    assert records.serialized_bytes(sent) == serialised(sent)
