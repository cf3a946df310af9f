import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.convert import STEPS, convert, single_file
from fedllm_flwr.models.progress import StepReport
from fedllm_flwr.models.sources import WeightSource, find_source


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


@pytest.mark.assets
@pytest.mark.slow
def test_dequantised_weights_are_the_gguf_files_own() -> None:
    """The oracle is the gguf package, tensor by tensor and without transformers."""
    gguf = pytest.importorskip("gguf")
    ref = ModelRef("smollm2_135m")
    (file,) = find_source(ref).files
    wanted = {
        "blk.3.ffn_up.weight": "model.layers.3.mlp.up_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    checked = 0
    with safe_open(converted(ref, "bfloat16") / "model.safetensors", "pt") as copy:
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.name in wanted:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                expected = torch.tensor(values).to(torch.bfloat16)
                assert torch.equal(copy.get_tensor(wanted[tensor.name]), expected), tensor.name
                checked += 1
    assert checked == len(wanted)
