import pytest

from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.tokenizers import load_tokenizer


def test_the_tiny_models_is_its_own() -> None:
    ref = ModelRef(name="tiny")
    text = "the harvest was good"
    assert load_tokenizer(ref)(text)["input_ids"] == load(ref).tokenizer(text)["input_ids"]
    assert load_tokenizer(ref) is load_tokenizer(ref)


def test_a_folder_without_a_model_is_said() -> None:
    with pytest.raises(AssetError):
        load_tokenizer(ModelRef(name="path", path="nowhere"))


@pytest.mark.assets
def test_the_default_models_is_that_of_the_loaded_model() -> None:
    found = load_tokenizer(ModelRef(name="smollm2_135m"))
    assert found.decode(found("Oil prices rose")["input_ids"]) == "Oil prices rose"
