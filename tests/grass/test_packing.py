import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.grass.packing import bitmap, indices_of, pack, scales_of, scales_text, unpack
from fedllm_flwr.grass.rows import RowUpdate


@given(st.data())
def test_a_bitmap_comes_back(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 70))
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), dtype=np.int64)
    text = bitmap(chosen, rows)
    np.testing.assert_array_equal(indices_of(text, rows, "test"), chosen)
    assert len(text) == 4 * -(-rows // 24)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "got None"),
        ([1, 2], r"got \[1, 2\]"),
        ("ä", "got 'ä'"),
        ("AAA", "got 'AAA'"),
        ("", "got 0 bits"),
        (bitmap(np.array([0]), 24), "got 24 bits"),
        (base64.b64encode(bytes([0, 1])).decode(), "got 16 bits"),
    ],
)
def test_what_is_no_bitmap_of_ten_rows_is_refused(text: object, reason: str) -> None:
    with pytest.raises(WireError, match=f"client 3: expected a bitmap of 10 rows, {reason}"):
        indices_of(text, 10, "client 3")


def test_rows_are_packed_in_the_order_of_names() -> None:
    updates = {
        "b": RowUpdate(np.array([2]), np.array([[7.0, 8.0]], np.float32)),
        "a": RowUpdate(np.array([0, 3]), np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    flat = pack(updates)
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 7, 8])
    indices = {name: update.indices for name, update in updates.items()}
    found = unpack(flat, indices, {"a": 3, "b": 2, "unused": 9})
    for name, update in updates.items():
        np.testing.assert_array_equal(found[name].values, update.values)
        np.testing.assert_array_equal(found[name].indices, update.indices)
    with pytest.raises(ShapeError, match="rows: expected 8 values, got 7"):
        unpack(flat[:-1], indices, {"a": 3, "b": 2})


def test_nothing_packs_to_nothing() -> None:
    assert pack({}).dtype == np.float32
    assert unpack(pack({}), {}, {}) == {}


def test_scales_keep_their_bits() -> None:
    scales = np.array([1 / 3, 1e-30, 7], np.float32)
    np.testing.assert_array_equal(scales_of(scales_text(scales)), scales)
