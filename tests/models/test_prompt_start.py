from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm_flwr.errors import AssetError, ConfigError
from fedllm_flwr.models import backbone as backbone_module
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.prompt_start import (
    InputEmbeddings,
    StartKind,
    embedding_table,
    embeddings_of,
    prompt_width,
    start_prompt,
)
from fedllm_flwr.models.tiny import tiny_model, tiny_tokenizer

TINY = ModelRef("tiny")
KINDS: list[tuple[StartKind, str]] = [("random", ""), ("vocabulary", ""), ("text", "a topic")]
TABLE = InputEmbeddings(tiny_model().get_input_embeddings(), tiny_tokenizer())


def start(table: InputEmbeddings, kind: StartKind, text: str, length: int = 6, seed: int = 3):
    return start_prompt(table, length, kind, seed, text).reshape(length, -1)


def scaled_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """A small Gemma 3, whose embedding module multiplies the rows that it stores."""
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=512,
        hidden_size=48,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@given(length=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_random_rows_have_the_embeddings_mean_rms(length: int, seed: int) -> None:
    weight = TABLE.module.weight.detach().numpy().astype(np.float64)
    mean = np.mean([np.sqrt(np.mean(row**2)) for row in weight])
    values = start(TABLE, "random", "", length, seed)
    np.testing.assert_allclose(np.sqrt((values.astype(np.float64) ** 2).mean(1)), mean, rtol=1e-6)
    assert len(np.unique(values[:, 0])) == length


@given(length=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_vocabulary_rows_are_different_ordinary_tokens(length: int, seed: int) -> None:
    weight = TABLE.module.weight.detach().numpy()
    tokens = [
        int(np.flatnonzero((weight == row).all(axis=1))[0])
        for row in start(TABLE, "vocabulary", "", length, seed)
    ]
    assert len(set(tokens)) == length
    assert not set(tokens) & {0, 1, 2, 3}  # pad, end and the chat marks
    assert max(tokens) < len(TABLE.tokenizer)


def test_text_rows_are_its_tokens_repeated_or_cut() -> None:
    weight = TABLE.module.weight.detach().numpy()
    ids = TABLE.tokenizer("a topic", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    long = start(TABLE, "text", "a topic", 2 * len(ids) + 1)
    assert np.array_equal(long, weight[[*ids, *ids, ids[0]]])
    assert np.array_equal(start(TABLE, "text", "a topic", 2), weight[ids[:2]])


def test_a_special_token_spelled_out_in_the_text_stays_text() -> None:
    values = start(TABLE, "text", "<|end|>", 4)
    end = TABLE.module.weight.detach().numpy()[1]
    assert not (values == end).all(axis=1).any()


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_a_start_is_float32_and_repeats(tiny: Backbone, kind: StartKind, text: str) -> None:
    before = torch.random.get_rng_state()
    one, two = start(embeddings_of(tiny), kind, text), start(embedding_table(TINY), kind, text)
    other = start(embedding_table(TINY, "float32"), kind, text, seed=4)
    assert one.dtype == np.float32
    assert one.shape == (6, prompt_width(TINY)) == (6, 64)
    np.testing.assert_allclose(one, two, rtol=1e-2)  # float32 against whatever auto chooses here
    assert np.array_equal(one, other) is (kind == "text")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_table_alone_is_the_loaded_models_embedding(
    checkpoint: Path, tmp_path: Path, own_cache: Path, dtype: str, scaled: bool
) -> None:
    folder = scaled_checkpoint(tmp_path / "scaled", torch.float32) if scaled else checkpoint
    ref = ModelRef("path", path=str(folder))
    loaded = embeddings_of(backbone_module.load(ref, dtype=dtype))
    alone = embedding_table(ref, dtype)
    ids = np.arange(512)
    assert np.array_equal(alone.rows(ids), loaded.rows(ids))
    stored = loaded.module.weight.float().numpy()
    factor = np.sqrt(48) if scaled else 1.0
    np.testing.assert_allclose(alone.rows(ids), factor * stored, rtol=1e-2 if scaled else 0)
    assert alone.mean_rms == loaded.mean_rms
    for kind, text in KINDS:
        assert np.array_equal(start(alone, kind, text), start(loaded, kind, text))
    assert prompt_width(ref) == alone.width == loaded.width
    backbone_module.reset()


def test_a_checkpoint_may_name_its_weights_without_the_models_prefix(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, file, metadata={"format": "pt"})
    found = embedding_table(ModelRef("path", path=str(checkpoint)), "float32")
    assert np.array_equal(found.rows([5]), weights["model.embed_tokens.weight"][[5]].numpy())
    save_file({"lm_head.other": weights["model.norm.weight"]}, file, metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"one weight model\.embed_tokens\.weight .*, got 0"):
        embedding_table(ModelRef("path", path=str(checkpoint)), "float32")


@pytest.mark.parametrize(
    ("length", "kind", "text", "message"),
    [
        (0, "random", "", "prompt length: expected at least 1, got 0"),
        (2, "zeros", "", "expected random, vocabulary or text, got 'zeros'"),
        (2, "text", "", "start text: expected a text for kind text only, got ''"),
        (2, "random", "hello", "start random: expected a text for kind text only, got 'hello'"),
        (999, "vocabulary", "", r"a length of at most \d+ tokens, got 999"),
    ],
)
def test_bad_starts_are_named(length: int, kind: StartKind, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start_prompt(TABLE, length, kind, 0, text)


@pytest.mark.assets
def test_the_real_models_table(tmp_path: Path) -> None:
    ref = ModelRef("smollm2_135m")
    alone = embedding_table(ref)
    loaded = embeddings_of(backbone_module.load(ref))
    ids = np.arange(0, 49152, 97)
    assert np.array_equal(alone.rows(ids), loaded.rows(ids))
    assert prompt_width(ref) == 576
    assert 0.01 < alone.mean_rms < 1
    marks = alone.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<repo_name>"])
    assert not set(marks) & set(alone.ordinary_tokens().tolist())
    backbone_module.reset()
