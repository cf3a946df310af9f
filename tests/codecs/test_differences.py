import numpy as np
import pytest

from fedllm_flwr.codecs import (
    CODECS,
    FLOAT_CODECS,
    CodecSettings,
    decode_difference,
    encode_difference,
)

LOSSY = [name for name in CODECS if name not in FLOAT_CODECS]
SHAPES = ((8, 30),)


@pytest.mark.parametrize("name", LOSSY)
def test_values_that_have_not_moved_are_exact(name: str) -> None:
    known = np.random.default_rng(0).standard_normal(240, dtype=np.float32)
    codec = CODECS[name](CodecSettings())
    stored = encode_difference(codec, known, known, SHAPES)
    np.testing.assert_array_equal(decode_difference(codec, stored, known, SHAPES), known)


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_left_out_is_of_the_difference_and_not_of_the_values(name: str) -> None:
    generator = np.random.default_rng(1)
    known = 100 * generator.standard_normal(240, dtype=np.float32)
    moved = np.float32(0.01) * generator.standard_normal(240, dtype=np.float32)
    codec = CODECS[name](CodecSettings())
    stored = encode_difference(codec, known + moved, known, SHAPES)
    found = decode_difference(codec, stored, known, SHAPES)
    assert np.abs(found - (known + moved)).max() <= np.abs(moved).max() + 1e-4
    assert np.linalg.norm(found - (known + moved)) < np.linalg.norm(moved)
