import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from fedllm_flwr.errors import DataError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.export import CONFIG_FILE, WEIGHTS_FILE
from fedllm_flwr.models.export_prompts import (
    README_FILE,
    SPEC_FILE,
    export_prompt,
    import_prompt,
)
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, attach_prompt, start_module
from fedllm_flwr.models.prompt_start import embedding_table, start_prompt
from fedllm_flwr.models.soft import soft_inputs
from fedllm_flwr.models.tiny import tiny_model, tiny_tokenizer
from fedllm_flwr.prompts import Placement, PromptSpec, Segment

# PEFT 0.21 asks the base model for a property that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

TINY = ModelRef("tiny")
FIXED = tuple(tiny_tokenizer()("Which topic is this?", add_special_tokens=False)["input_ids"])
ROW = (40, 41, 42, 43)
SEGMENTS = (Segment("personal", 2), Segment("shared", 3))
PEFT_SPECS = {
    "prompt": PeftPromptSpec("prompt_tuning", 4),
    "p-tuning": PeftPromptSpec("p_tuning", 4, 9),
    "prefix": PeftPromptSpec("prefix_tuning", 4),
    "projected prefix": PeftPromptSpec("prefix_tuning", 4, 9),
}
EACH_PEFT = pytest.mark.parametrize("spec", PEFT_SPECS.values(), ids=PEFT_SPECS)
EACH_PLACE = pytest.mark.parametrize("placement", ["before", "after"])


def random_prompt(length: int) -> np.ndarray:
    return start_prompt(embedding_table(TINY, "float32"), length, "random", 5)


def logits_of_peft(folder: Path, ids: tuple[int, ...]) -> torch.Tensor:
    """What anyone gets who loads the folder with PEFT over a fresh base model."""
    model = PeftModel.from_pretrained(tiny_model(), folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ROW) :]


@EACH_PLACE
def test_peft_computes_the_same_logits(
    tiny: Backbone, tmp_path: Path, placement: Placement
) -> None:
    spec, flat = PromptSpec(SEGMENTS, placement), random_prompt(5)
    export_prompt(tmp_path, TINY, spec, flat, fixed_ids=FIXED, dtype="float32")
    at = len(FIXED) if placement == "after" else 0
    whole = torch.tensor([[*FIXED, *ROW]])
    inputs = soft_inputs(
        tiny, whole, None, torch.from_numpy(flat).view(1, 5, 64), at=at, padding="right"
    )
    with torch.no_grad():
        ours = tiny.model(inputs_embeds=inputs.inputs_embeds).logits[0, -len(ROW) :]
        plain = tiny.model(input_ids=whole).logits[0, -len(ROW) :]
    fed = ROW if placement == "after" else (*FIXED, *ROW)
    found = logits_of_peft(tmp_path, fed)
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.05


@EACH_PEFT
def test_pefts_kinds_compute_the_same_logits(
    tiny: Backbone, tmp_path: Path, spec: PeftPromptSpec
) -> None:
    flat = 3 * start_module(TINY, spec, embedding_table(TINY, "float32"), 5)
    export_prompt(tmp_path, TINY, spec, flat, fixed_ids=FIXED)
    attached = attach_prompt(tiny, spec)
    attached.values.load(flat)
    with torch.no_grad():
        ours = tiny.model.lm_head(attached.hidden(torch.tensor([ROW])))[0]
    torch.testing.assert_close(logits_of_peft(tmp_path, ROW), ours, rtol=1e-4, atol=1e-4)


@EACH_PLACE
def test_import_reads_back_what_export_wrote(tmp_path: Path, placement: Placement) -> None:
    spec, flat = PromptSpec(SEGMENTS, placement), random_prompt(5)
    export_prompt(tmp_path / "new" / "folder", TINY, spec, flat, fixed_ids=FIXED)
    found = import_prompt(tmp_path / "new" / "folder")
    assert found.spec == spec
    assert found.flat.dtype == np.float32
    assert np.array_equal(found.flat, flat)
    assert found.fixed_ids == (FIXED if placement == "after" else ())


@EACH_PEFT
def test_import_of_pefts_kinds_computes_the_same(
    tiny: Backbone, tmp_path: Path, spec: PeftPromptSpec
) -> None:
    flat = 3 * start_module(TINY, spec, embedding_table(TINY, "float32"), 5)
    export_prompt(tmp_path, TINY, spec, flat)
    found = import_prompt(tmp_path)
    if spec.kind == "prefix_tuning":
        assert found.spec == PeftPromptSpec("prefix_tuning", 4)
    else:
        assert found.spec == PromptSpec((Segment("prompt", 4),), "before")
    plain = PeftPromptSpec("prefix_tuning" if spec.kind == "prefix_tuning" else "prompt_tuning", 4)
    states = []
    for own, values in ((spec, flat), (plain, found.flat)):
        attached = attach_prompt(tiny, own)
        attached.values.load(values)
        with torch.no_grad():
            states.append(attached.hidden(torch.tensor([ROW])))
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_import_reads_what_peft_wrote(tmp_path: Path, config: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path)
    found = import_prompt(tmp_path)
    written = model.prompt_encoder["default"].embedding.weight.detach().numpy()
    assert found.spec.length == 3
    assert np.array_equal(found.flat, written.flatten())
    assert isinstance(found.spec, PeftPromptSpec) is (config is PrefixTuningConfig)


def test_same_input_gives_the_same_bytes_and_a_readme(tmp_path: Path) -> None:
    spec = PromptSpec(SEGMENTS, "after")
    for name in ("one", "two"):
        export_prompt(tmp_path / name, TINY, spec, random_prompt(5), fixed_ids=FIXED)
    for name in (CONFIG_FILE, WEIGHTS_FILE, README_FILE, SPEC_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    readme = (tmp_path / "one" / README_FILE).read_text()
    assert "```text\nWhich topic is this?\n```" in readme
    assert f"first {len(FIXED)} virtual tokens" in readme
    assert "add_special_tokens=False" in readme
    export_prompt(tmp_path / "before", TINY, PromptSpec(SEGMENTS, "before"), random_prompt(5))
    assert "The whole text" in (tmp_path / "before" / README_FILE).read_text()


def test_configuration_names_the_upstream_base(tmp_path: Path) -> None:
    ref = ModelRef("smollm2_135m")
    flat = np.zeros(5 * 576, dtype=np.float32)
    export_prompt(tmp_path, ref, PromptSpec(SEGMENTS, "before"), flat)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["num_virtual_tokens"], config["token_dim"]) == (5, 576)
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True


def test_a_wrong_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"flat prompt of \(320,\) = 5 x 64, got \(64,\)"):
        export_prompt(tmp_path, TINY, PromptSpec(SEGMENTS, "before"), random_prompt(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "PROMPT_TUNING, PREFIX_TUNING, P_TUNING, got 'LORA'"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is missing"),
        ({"num_transformer_submodules": 2}, "one transformer submodule, got 2"),
        ({"num_virtual_tokens": 9}, r"expected 9 virtual tokens, got shape \(5, 64\)"),
    ],
)
def test_foreign_adapters_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    export_prompt(tmp_path, TINY, PromptSpec(SEGMENTS, "before"), random_prompt(5))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=message):
        import_prompt(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"adapter_config\.json: cannot be read"):
        import_prompt(tmp_path)
    export_prompt(tmp_path, TINY, PromptSpec(SEGMENTS, "before"), random_prompt(5))
    own = json.loads((tmp_path / SPEC_FILE).read_text())
    (tmp_path / SPEC_FILE).write_text(json.dumps({**own, "fixed_ids": [7]}))
    with pytest.raises(DataError, match=r"prompt\.json: expected 5 fixed and soft .* got 1 \+ 5"):
        import_prompt(tmp_path)
    (tmp_path / SPEC_FILE).write_text(json.dumps({**own, "segments": []}))
    with pytest.raises(DataError, match=r"prompt\.json: cannot be read: .* at least one"):
        import_prompt(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"not tensors")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: cannot be read"):
        import_prompt(tmp_path)


def test_a_later_export_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    export_prompt(tmp_path, TINY, PromptSpec(SEGMENTS, "after"), random_prompt(5), fixed_ids=FIXED)
    export_prompt(tmp_path, TINY, PEFT_SPECS["prompt"], random_prompt(4))
    assert import_prompt(tmp_path).spec == PromptSpec((Segment("prompt", 4),), "before")
