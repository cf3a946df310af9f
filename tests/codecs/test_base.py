import math

import numpy as np
import pytest

from fedllm_flwr.codecs import CODECS, CodecSettings, count_values
from fedllm_flwr.codecs.base import as_bytes, from_bytes

SIZES = ((), ((0,),), ((1,),), ((1, 1),), ((3, 5), (7,), (9, 9)), ((40, 30),))


def test_values_are_counted_over_all_matrices() -> None:
    assert [count_values(shapes) for shapes in SIZES] == [0, 0, 1, 1, 103, 1200]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shapes", SIZES, ids=str)
def test_every_codec_is_as_large_as_it_says_and_knows_its_name(name: str, shapes: tuple) -> None:
    codec = CODECS[name](CodecSettings(block_size=16, top_k_fraction=0.2, low_rank=2))
    values = np.random.default_rng(0).standard_normal(count_values(shapes), dtype=np.float32)
    stored = codec.encode(values, shapes)
    assert codec.name == name
    assert stored.ndim == 1
    assert stored.nbytes == codec.size_bytes(shapes)
    found = codec.decode(stored, shapes)
    assert found.dtype == np.float32
    assert found.shape == values.shape
    assert math.isfinite(float(np.abs(found - values).max(initial=0.0)))


@pytest.mark.parametrize("name", CODECS)
def test_zeros_come_back_as_zeros(name: str) -> None:
    """So a difference of nothing costs bytes and changes nothing."""
    codec = CODECS[name](CodecSettings())
    stored = codec.encode(np.zeros(600, np.float32), ((20, 30),))
    assert not codec.decode(stored, ((20, 30),)).any()


def test_bytes_are_little_endian() -> None:
    values = np.array([1.0, -2.5], np.float32)
    assert as_bytes(values, "<f4").tobytes() == b"\x00\x00\x80?\x00\x00 \xc0"
    np.testing.assert_array_equal(from_bytes(as_bytes(values, "<f4"), "<f4"), values)


def test_eight_bits_are_half_of_bfloat16_and_a_64th() -> None:
    wide, narrow = (
        CODECS[n](CodecSettings()).size_bytes(((460_800,),)) for n in ("bfloat16", "int8")
    )
    assert narrow == wide // 2 + 4 * 460_800 // 256
    assert narrow / wide == 0.5 + 1 / 128
