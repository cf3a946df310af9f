import hashlib
from pathlib import Path

import pytest

from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.convert import STEPS, convert, single_file
from fedllm_flwr.models.progress import StepReport
from fedllm_flwr.models.sources import WeightSource


def test_pieces_are_joined_and_removed(tmp_path: Path) -> None:
    pieces = []
    for index, content in enumerate((b"GG", b"UF", b"rest")):
        pieces.append(tmp_path / f"part{index}")
        pieces[-1].write_bytes(content)
    target = tmp_path / "target"
    target.mkdir()
    with single_file(WeightSource("gguf", tuple(pieces), "f"), target) as file:
        assert file.read_bytes() == b"GGUFrest"
    assert list(target.iterdir()) == []


def test_single_piece_is_used_in_place(tmp_path: Path) -> None:
    with single_file(WeightSource("gguf", (tmp_path / "whole.gguf",), "f"), tmp_path) as file:
        assert file == tmp_path / "whole.gguf"


def test_wrong_packaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    source = WeightSource("gguf", (file,), "0" * 64, sha256="0" * 64)
    with (
        StepReport("test", STEPS) as report,
        pytest.raises(AssetError, match=f"expected sha256 {'0' * 64}, got {found}"),
    ):
        convert(source, "bfloat16", tmp_path, report)


def test_folder_that_is_no_language_model_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "vit"}')
    source = WeightSource("checkpoint", (checkpoint / "model.safetensors",), "f")
    with (
        StepReport("test", STEPS) as report,
        pytest.raises(AssetError, match="not a causal language model that can be read") as caught,
    ):
        convert(source, "bfloat16", tmp_path / "out", report)
    assert "\n" not in str(caught.value)
