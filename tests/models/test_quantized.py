import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models import backbone as backbones
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, layer_shapes
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.quantized import check_package, quantize
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.local import ClientJob, train
from fedllm_flwr.training.settings import LocalSettings

KINDS = ("int8", "nf4")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_nothing_is_loaded(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ref = ModelRef(name="path", path="/no/such/folder", quantization=kind)
    reason = f"model.quantization={kind}: expected the package bitsandbytes"
    with pytest.raises(ConfigError, match=reason):
        backbones.load(ref, dtype="float32")
    with pytest.raises(ConfigError, match=reason):
        quantize(None, (), kind, "cpu")
    check_package("none")


def small(kind: Any) -> Backbone:
    return backbones.load(ModelRef(name="tiny", quantization=kind), dtype="float32", device="cpu")


def dequantized(layer: Any, kind: str) -> torch.Tensor:
    """By the formats' own definitions, not by the package's layers."""
    if kind == "int8":
        state = layer.weight if layer.weight.CB is not None else layer.state
        return state.CB.float() * state.SCB[:, None] / 127
    state = layer.weight.quant_state
    packed = layer.weight.detach().flatten()
    places = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return (state.code[places].view(-1, state.blocksize) * state.absmax[:, None]).view(state.shape)


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_with_its_dequantised_weight_and_hands_its_gradient_down(
    kind: Any, tiny: Backbone
) -> None:
    name = "model.layers.0.mlp.down_proj"
    plain, layer = tiny.linear_layers[name], small(kind).linear_layers[name]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 5, plain.in_features, generator=generator, requires_grad=True)
    slope = torch.randn(2, 5, plain.out_features, generator=generator)
    output = layer(inputs)
    output.backward(slope)
    weight = dequantized(layer, kind)
    assert (
        0
        < (weight - plain.weight).norm() / plain.weight.norm()
        < (0.01 if kind == "int8" else 0.11)
    )
    # int8 rounds inputs to 1/254 of a row's largest value; nf4 rounds weights only
    wanted = inputs.detach() @ weight.t()
    assert (output - wanted).norm() / wanted.norm() < (0.02 if kind == "int8" else 1e-5)
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, slope @ weight, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in layer.parameters())


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held(kind: Any, tiny: Backbone) -> None:
    held = small(kind)
    assert held.ref.label == f"tiny in {kind}"
    assert set(held.linear_layers) == set(tiny.linear_layers)
    assert held.head_weight().dtype == torch.float32  # the head and the embedding are as they were
    for name, layer in held.linear_layers.items():
        size = tiny.linear_layers[name].weight.numel()
        assert layer.weight.nbytes == (size if kind == "int8" else size / 2)


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_a_transposed_layer_with_a_bias(kind: Any) -> None:
    model = torch.nn.Module()
    model.layer = Conv1D(24, 64)  # 64 inputs, 24 outputs
    torch.nn.init.normal_(model.layer.bias)
    model.layer.requires_grad_(False)
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    wanted = model.layer(inputs)
    quantize(model, ["layer"], kind, "cpu")
    found = model.layer(inputs)
    assert 0 < (found - wanted).norm() / wanted.norm() < (0.02 if kind == "int8" else 0.2)


def rows_of(client: int) -> list[Encoded]:
    draws = np.random.default_rng(client)
    found = []
    for index in range(6):
        ids = draws.integers(0, 300, int(draws.integers(5, 11))).astype(np.int32)
        places = np.arange(len(ids) - 1, dtype=np.int32)
        found.append(Encoded(f"row{index}", ids, places, ids[1:], -1, 1))
    return found


SPECS = {
    "lora": LoraSpec(rank=3, alpha=6.0),
    "lora with dropout": LoraSpec(rank=3, alpha=6.0, dropout=0.2),
    "prompt": PromptSpec((Segment("shared", 3),), "before"),
}


@needs_package
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", SPECS)
def test_adapters_learn_over_a_quantised_model_alone_and_together(kind: Any, adapter: str) -> None:
    held, spec = small(kind), SPECS[adapter]
    size = 3 * held.hidden_size
    if isinstance(spec, LoraSpec):
        size = AdapterLayout(layer_shapes(held.ref, spec.target_modules), spec.rank).size
    draws = np.random.default_rng(5)
    jobs = [
        ClientJob(
            c, rows_of(c), (0.1 * draws.standard_normal(size)).astype(np.float32), spec, seed=c
        )
        for c in (1, 2)
    ]
    before = {name: layer.weight.clone() for name, layer in held.linear_layers.items()}
    settings = LocalSettings(batch_size=3, local_steps=6, learning_rate=0.02)
    alone = [train(held, [job], settings)[0] for job in jobs]
    together = train(held, jobs, settings)
    for one, two in zip(alone, together, strict=True):
        assert one.error == two.error == ""
        assert one.loss < one.first_loss
        assert two.first_loss == pytest.approx(one.first_loss, rel=1e-3)
        assert two.loss == pytest.approx(one.loss, rel=0.01)
    assert all(torch.equal(before[n], layer.weight) for n, layer in held.linear_layers.items())
