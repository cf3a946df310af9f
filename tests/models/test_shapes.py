import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from fedllm_flwr.errors import AssetError, ConfigError
from fedllm_flwr.models import shapes as shapes_module
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import MODELS, ModelRef
from fedllm_flwr.models.kernels import choose
from fedllm_flwr.models.shapes import LayerShape, check_rank, check_targets, layer_shapes
from fedllm_flwr.models.tiny import tiny_tokenizer


def test_tiny_shapes_show_grouped_attention() -> None:
    assert layer_shapes(ModelRef("tiny"), ("k_proj", "down_proj")) == (
        LayerShape("model.layers.0.mlp.down_proj", 96, 64),
        LayerShape("model.layers.0.self_attn.k_proj", 64, 32),
        LayerShape("model.layers.1.mlp.down_proj", 96, 64),
        LayerShape("model.layers.1.self_attn.k_proj", 64, 32),
    )


def test_packaged_model_needs_neither_package_nor_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were looked for")

    monkeypatch.setattr(shapes_module, "converted", refuse)
    monkeypatch.setattr(shapes_module, "config_file", refuse)
    shapes_module._all_shapes.cache_clear()
    found = layer_shapes(ModelRef("smollm2_135m"), ("q_proj", "v_proj"))
    assert len(found) == 60
    assert found[-1] == LayerShape("model.layers.9.self_attn.v_proj", 576, 192)


def test_checkpoint_needs_only_its_configuration(checkpoint: Path) -> None:
    ref = ModelRef("path", path=str(checkpoint))
    expected = layer_shapes(ModelRef("tiny"), ("all-linear",))
    (checkpoint / "model.safetensors").unlink()
    assert layer_shapes(ref, ("all-linear",)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "vit is not a causal language model"),
        ({"model_type": "no-such-thing"}, r"its config\.json is not a known configuration"),
        ({}, r"its config\.json is not a known configuration"),
    ],
)
def test_folder_of_another_kind_is_one_line(
    tmp_path: Path, config: dict[str, str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssetError, match=message) as caught:
        layer_shapes(ModelRef("path", path=str(tmp_path)), ("q_proj",))
    assert "\n" not in str(caught.value)


def test_rank_above_a_layers_width_names_layer_width_and_rank() -> None:
    shapes = layer_shapes(ModelRef("tiny"), ("q_proj", "k_proj"))
    check_rank(shapes, 32)  # equal to the width of k_proj is fine
    with pytest.raises(
        ConfigError,
        match=r"rank 33 is larger than layer model\.layers\.0\.self_attn\.k_proj: .* width 32",
    ):
        check_rank(shapes, 33)


def test_check_targets() -> None:
    ref = ModelRef("tiny")
    assert check_targets(ref, ("q_proj",), 4) == layer_shapes(ref, ("q_proj",))
    with pytest.raises(ConfigError, match="at least one layer name"):
        check_targets(ref, (), 4)
    with pytest.raises(
        ConfigError, match="'nope' is no linear layer of model tiny; it has down_proj"
    ):
        check_targets(ref, ("nope",), 4)
    with pytest.raises(ConfigError, match="rank 64 is larger"):
        check_targets(ref, ("v_proj",), 64)


@pytest.mark.assets
def test_catalog_configuration_is_the_files_own() -> None:
    """The configuration written into the catalog must be that of the converted GGUF file."""
    ref = ModelRef("smollm2_135m")
    own = AutoConfig.from_pretrained(converted(ref, choose().dtype))
    stated = MODELS["smollm2_135m"].config
    assert {name: getattr(own, name) for name in stated} == stated
    layers = load(ref).target_layers(("all-linear",))
    assert [shape.name for shape in layer_shapes(ref, ("all-linear",))] == list(layers)


def test_shapes_are_those_of_the_loaded_model(checkpoint: Path) -> None:
    tiny_tokenizer().save_pretrained(checkpoint)
    ref = ModelRef("path", path=str(checkpoint))
    layers = load(ref, dtype="float32").linear_layers
    for shape in layer_shapes(ref, ("all-linear",)):
        assert layers[shape.name].weight.shape == (shape.out_features, shape.in_features)
