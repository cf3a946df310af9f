import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedllm_flwr.averaging import LoraFactors, LowRank, product_of
from fedllm_flwr.errors import DataError, ShapeError
from fedllm_flwr.models.adapters import LoraSpec, attach, initial_factors, layer_shapes
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.carried import delta_active
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.export import CONFIG_FILE, WEIGHTS_FILE, export_peft, import_peft
from fedllm_flwr.models.tiny import tiny_model

# PEFT 0.21 asks the base model for a property that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

MakeAdapter = Callable[..., dict[str, LoraFactors]]
MakeDelta = Callable[..., dict[str, LowRank]]
TINY = ModelRef("tiny")
IDS = torch.tensor([[5, 6, 7, 8, 9]])
SPEC = LoraSpec(3, 8.0, 0.1, ("q_proj", "down_proj"))


def logits_of_peft(folder: Path) -> torch.Tensor:
    """What anyone gets who loads the folder with PEFT over a fresh base model."""
    model = PeftModel.from_pretrained(tiny_model(), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def own_logits(
    tiny: Backbone, spec: LoraSpec, adapter: dict[str, LoraFactors], delta: dict[str, LowRank]
) -> torch.Tensor:
    attached = attach(tiny, spec)
    attached.load(adapter)
    with attached.active(train=False), delta_active(tiny, delta), torch.no_grad():
        return tiny.model(input_ids=IDS).logits


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("all-linear",), ("v_proj",)])
@pytest.mark.parametrize("delta_on", ["nothing", "the same layers", "some layers", "other layers"])
def test_peft_computes_the_same_logits(
    tiny: Backbone,
    make_adapter: MakeAdapter,
    make_delta: MakeDelta,
    tmp_path: Path,
    use_rslora: bool,
    targets: tuple[str, ...],
    delta_on: str,
) -> None:
    spec = LoraSpec(3, 8.0, 0.1, targets, use_rslora)
    shapes = layer_shapes(TINY, targets)
    adapter = make_adapter(shapes, spec, seed=1)
    where = {
        "nothing": (),
        "the same layers": shapes,
        "some layers": shapes[1:2],
        "other layers": layer_shapes(TINY, ("o_proj",)),
    }[delta_on]
    delta = make_delta(where, 5, seed=2)
    export_peft(tmp_path, TINY, spec, adapter, delta)
    ours = own_logits(tiny, spec, adapter, delta)
    torch.testing.assert_close(logits_of_peft(tmp_path), ours, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (tiny.model(input_ids=IDS).logits - ours).abs().max() > 0.1


def test_layers_of_mixed_rank_and_scaling(tiny: Backbone, tmp_path: Path) -> None:
    """Layer 1 must not be mistaken for layer 11, nor one layer's rank for another's."""
    shapes = layer_shapes(TINY, SPEC.target_modules)
    rng = np.random.default_rng(0)
    adapter = {
        shape.name: LoraFactors(
            rng.normal(size=(rank, shape.in_features)).astype(np.float32),
            rng.normal(0, 0.1, (shape.out_features, rank)).astype(np.float32),
            scaling,
        )
        for shape, rank, scaling in zip(shapes, (1, 2, 3, 5), (0.5, 8 / 3, 1.0, 3.0), strict=True)
    }
    export_peft(tmp_path, TINY, SPEC, adapter)
    with (
        delta_active(tiny, {name: product_of(value) for name, value in adapter.items()}),
        torch.no_grad(),
    ):
        expected = tiny.model(input_ids=IDS).logits
    torch.testing.assert_close(logits_of_peft(tmp_path), expected, rtol=1e-4, atol=1e-4)
    _, back = import_peft(tmp_path)
    for name, factors in adapter.items():
        assert back[name].scaling == pytest.approx(factors.scaling, rel=1e-12)
        assert np.array_equal(back[name].lora_a, factors.lora_a)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_import_reads_back_what_export_wrote(
    make_adapter: MakeAdapter, tmp_path: Path, use_rslora: bool
) -> None:
    spec = LoraSpec(3, 8.0, 0.1, ("down_proj", "q_proj"), use_rslora)
    adapter = make_adapter(layer_shapes(TINY, spec.target_modules), spec, seed=1)
    export_peft(tmp_path / "new" / "folder", TINY, spec, adapter)
    back_spec, back = import_peft(tmp_path / "new" / "folder")
    assert back_spec == spec
    assert back.keys() == adapter.keys()
    for name, factors in adapter.items():
        assert np.array_equal(back[name].lora_a, factors.lora_a)
        assert np.array_equal(back[name].lora_b, factors.lora_b)
        assert back[name].scaling == factors.scaling


def test_import_of_a_carried_update_is_the_same_product(
    make_adapter: MakeAdapter, make_delta: MakeDelta, tmp_path: Path
) -> None:
    shapes = layer_shapes(TINY, SPEC.target_modules)
    adapter, delta = make_adapter(shapes, SPEC, seed=1), make_delta(shapes[:1], 4, seed=2)
    export_peft(tmp_path, TINY, SPEC, adapter, delta)
    _, back = import_peft(tmp_path)
    name = shapes[0].name
    assert back[name].lora_a.shape[0] == 3 + 4
    assert back[name].scaling == 1.0
    whole = adapter[name].scaling * adapter[name].lora_b @ adapter[name].lora_a
    whole = whole + delta[name].left @ delta[name].right
    np.testing.assert_allclose(back[name].lora_b @ back[name].lora_a, whole, rtol=1e-4, atol=1e-5)


def test_import_reads_what_peft_wrote(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules="all-linear",
            rank_pattern={"q_proj": 2},
            alpha_pattern={"up_proj": 9},
        )
        model = get_peft_model(tiny_model(), config)
    model.save_pretrained(tmp_path)
    spec, factors = import_peft(tmp_path)
    assert (spec.rank, spec.alpha) == (4, 6)
    assert len(factors) == 14
    assert factors["model.layers.0.self_attn.q_proj"].lora_a.shape == (2, 64)
    assert factors["model.layers.0.self_attn.q_proj"].scaling == 3.0
    assert factors["model.layers.1.mlp.up_proj"].scaling == 9 / 4
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    expected = layer.lora_A["default"].weight.detach().numpy()
    assert np.array_equal(factors["model.layers.1.mlp.up_proj"].lora_a, expected)


def test_same_input_gives_the_same_bytes(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(layer_shapes(TINY, SPEC.target_modules), SPEC, seed=1)
    shuffled = dict(reversed(list(adapter.items())))
    export_peft(tmp_path / "one", TINY, SPEC, adapter)
    export_peft(tmp_path / "two", TINY, SPEC, shuffled)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_configuration_names_base_and_short_targets(tmp_path: Path) -> None:
    ref = ModelRef("smollm2_135m")
    spec = LoraSpec(2, 4.0)
    export_peft(
        tmp_path, ref, spec, initial_factors(layer_shapes(ref, spec.target_modules), spec, 0)
    )
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM"


def test_bad_exports_are_named(
    make_adapter: MakeAdapter, make_delta: MakeDelta, tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match="expected at least one adapted layer"):
        export_peft(tmp_path, TINY, SPEC, {})
    shapes = layer_shapes(TINY, SPEC.target_modules)
    adapter = make_adapter(shapes, SPEC, seed=1)
    name = shapes[0].name
    misfit = {name: LowRank(np.ones((3, 1), np.float32), np.ones((1, 96), np.float32))}
    with pytest.raises(
        ShapeError, match=r"down_proj: expected a delta of shape \(64, 96\), got \(3, 96\)"
    ):
        export_peft(tmp_path, TINY, SPEC, adapter, misfit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got 'IA3'"),
        ({"r": None}, "r is missing"),
        ({"use_dora": True}, "use_dora is set; expected a plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    ],
)
def test_foreign_adapters_are_refused(
    make_adapter: MakeAdapter, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    adapter = make_adapter(layer_shapes(TINY, SPEC.target_modules), SPEC, seed=1)
    export_peft(tmp_path, TINY, SPEC, adapter)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=message):
        import_peft(tmp_path)


def test_missing_and_broken_files_are_named(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"adapter_config\.json: cannot be read"):
        import_peft(tmp_path)
    adapter = make_adapter(layer_shapes(TINY, SPEC.target_modules), SPEC, seed=1)
    export_peft(tmp_path, TINY, SPEC, adapter)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"not tensors")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: cannot be read"):
        import_peft(tmp_path)
