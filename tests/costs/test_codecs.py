import subprocess
import sys

import numpy as np
import pytest

from fedllm_flwr.codecs import CODECS, CodecSettings, count_values
from fedllm_flwr.costs import codec_bytes, grass_matrices, lora_matrices, lora_parameters
from fedllm_flwr.errors import ConfigError

SMALL = [(64, 64), (64, 32), (32, 172)]
SENT = {
    "LoRA": lora_matrices(SMALL, 8),
    "prompt": [(10, 64)],
    "GRASS": grass_matrices(SMALL, 16),
    "nothing": [],
    "one value": [(1, 1)],
}


@pytest.mark.parametrize("what", SENT)
@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 7, "top_k_fraction": 0.01, "low_rank": 2}, {"top_k_fraction": 1.0}],
    ids=str,
)
def test_predicted_bytes_are_those_of_the_arrays(what: str, options: dict) -> None:
    matrices = SENT[what]
    predicted = codec_bytes(matrices, **options)
    assert list(predicted) == list(CODECS)
    values = np.random.default_rng(0).standard_normal(count_values(matrices), dtype=np.float32)
    for name, codec in CODECS.items():
        made = codec(CodecSettings(**options))
        assert made.encode(values, matrices).nbytes == predicted[name], name


def test_the_flagship_adapter_by_hand() -> None:
    """Rank 8 on the four attention projections of 30 layers of width 576, keys and values 192 wide."""
    layers = [(576, 576), (576, 192), (576, 192), (576, 576)] * 30
    values = lora_parameters(layers, 8)
    assert values == 921_600
    found = codec_bytes(lora_matrices(layers, 8))
    assert found == {
        "float32": 3_686_400,
        "float16": 1_843_200,
        "bfloat16": 1_843_200,
        "int8": 936_000,
        "int4": 475_200,
        "top_k": 4 * 92_160 + 115_200,
        "low_rank": 4 * 4 * 30 * (2 * 2 * (8 + 576) + 2 * (8 + 576) + 2 * (8 + 192)),
    }
    assert found["int8"] / found["bfloat16"] == 0.5 + 1 / 128


def test_grass_sends_the_weights_of_some_outputs() -> None:
    assert grass_matrices([(576, 1536), (1536, 576), (8, 4)], 64) == [
        (64, 576),
        (64, 1536),
        (4, 8),
    ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, "expected block_size >= 1, got 0"),
        ({"low_rank": 0}, "expected low_rank >= 1, got 0"),
        ({"top_k_fraction": 0.0}, r"expected top_k_fraction in \(0, 1\], got 0\.0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        codec_bytes([(2, 2)], **options)


def test_codecs_are_counted_without_numpy() -> None:
    code = "import sys, fedllm_flwr.costs.codecs; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
