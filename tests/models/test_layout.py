import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from fedllm_flwr.averaging import LoraFactors
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.layout import AdapterLayout, LoraSpec, initial_factors
from fedllm_flwr.models.shapes import LayerShape

SHAPES = (LayerShape("a.x", 5, 4), LayerShape("b.y", 3, 7))


def numbered(rank: int, start: int = 0) -> dict[str, LoraFactors]:
    count = start
    adapter = {}
    for shape in SHAPES:
        arrays = []
        for size in ((rank, shape.in_features), (shape.out_features, rank)):
            arrays.append(
                np.arange(count, count + size[0] * size[1], dtype=np.float32).reshape(size)
            )
            count += arrays[-1].size
        adapter[shape.name] = LoraFactors(arrays[0], arrays[1], 2.0)
    return adapter


def test_order_is_by_layer_and_a_before_b() -> None:
    layout = AdapterLayout(SHAPES, 2)
    assert layout.size == 2 * (5 + 4) + 2 * (3 + 7)
    assert np.array_equal(layout.pack(numbered(2)), np.arange(layout.size))


@given(st.integers(1, 3), st.sampled_from(["both", "a", "b"]))
def test_unpack_undoes_pack(rank: int, side: str) -> None:
    layout = AdapterLayout(SHAPES, rank, side)  # type: ignore[arg-type]
    adapter = numbered(rank)
    back = layout.unpack(layout.pack(adapter), 2.0, frozen=adapter)
    for name, factors in adapter.items():
        assert np.array_equal(back[name].lora_a, factors.lora_a)
        assert np.array_equal(back[name].lora_b, factors.lora_b)
        assert back[name].scaling == 2.0


def test_unpack_copies_nothing() -> None:
    layout = AdapterLayout(SHAPES, 2)
    flat = layout.pack(numbered(2))
    layout.unpack(flat, 1.0)["b.y"].lora_b[0, 0] = -1
    assert -1 in flat


def test_sides_together_are_the_whole() -> None:
    sizes = {side: AdapterLayout(SHAPES, 3, side).size for side in ("both", "a", "b")}  # type: ignore[arg-type]
    assert sizes["a"] + sizes["b"] == sizes["both"]
    assert sizes["a"] == 3 * (5 + 3)
    assert AdapterLayout(SHAPES, 3).shapes == ((3, 5), (4, 3), (3, 3), (7, 3))
    assert AdapterLayout(SHAPES, 3, "b").shapes == ((4, 3), (7, 3))


def test_pack_makes_float32() -> None:
    wide = {
        name: LoraFactors(value.lora_a.astype(np.float64), value.lora_b, value.scaling)
        for name, value in numbered(2).items()
    }
    assert AdapterLayout(SHAPES, 2).pack(wide).dtype == np.float32


def test_wrong_layers_shapes_and_sizes_are_named() -> None:
    layout = AdapterLayout(SHAPES, 2)
    with pytest.raises(ShapeError, match=r"these differ: b\.y"):
        layout.pack({"a.x": numbered(2)["a.x"]})
    with pytest.raises(ShapeError, match=r"layer a\.x, lora_a: expected \(2, 5\), got \(1, 5\)"):
        layout.pack(numbered(1))  # a rank-1 client is never stretched
    with pytest.raises(ShapeError, match=r"expected \(38,\), got \(37,\)"):
        layout.unpack(np.zeros(37, np.float32), 1.0)
    one_sided = AdapterLayout(SHAPES, 2, "b")
    with pytest.raises(ShapeError, match="side b: expected the frozen other side, got none"):
        one_sided.unpack(np.zeros(one_sided.size, np.float32), 1.0)
    with pytest.raises(ShapeError, match="sorted by name"):
        AdapterLayout(SHAPES[::-1], 2)
    with pytest.raises(ConfigError, match=r"rank 4 is larger than layer b\.y: .* width 3"):
        AdapterLayout(SHAPES, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "LoRA rank: expected at least 1, got 0"),
        ({"alpha": 0.0}, "LoRA alpha: expected a finite number > 0, got 0.0"),
        ({"alpha": math.inf}, "LoRA alpha: expected a finite number > 0, got inf"),
        ({"dropout": 1.0}, "LoRA dropout: expected a probability in [0, 1), got 1.0"),
        ({"target_modules": ()}, "LoRA target_modules: expected a list of layer names, got ()"),
        ({"target_modules": "q_proj"}, "expected a list of layer names, got 'q_proj'"),
    ],
)
def test_settings_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraSpec(**{"rank": 8, "alpha": 16.0, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_pefts(use_rslora: bool) -> None:
    spec = LoraSpec(4, 12.0, use_rslora=use_rslora)
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=use_rslora)
    layer = PeftLinear(nn.Linear(8, 8), "name", config=config, r=4, lora_alpha=12)
    assert spec.scaling == layer.scaling["name"]
    assert spec.scaling == (6.0 if use_rslora else 3.0)


def test_start_leaves_the_model_unchanged_and_depends_on_the_address_only() -> None:
    spec = LoraSpec(2, 4.0)
    start = initial_factors(SHAPES, spec, seed=1)
    assert all(not factors.lora_b.any() for factors in start.values())
    assert all(factors.lora_a.dtype == np.float32 for factors in start.values())
    alone = initial_factors(SHAPES[1:], spec, seed=1)
    assert np.array_equal(alone["b.y"].lora_a, start["b.y"].lora_a)
    other = initial_factors(SHAPES, spec, seed=2)
    assert not np.array_equal(other["a.x"].lora_a, start["a.x"].lora_a)


def test_start_has_pefts_bound() -> None:
    shape = (LayerShape("wide", 400, 50),)
    ours = initial_factors(shape, LoraSpec(40, 1.0), seed=0)["wide"].lora_a
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=40, lora_alpha=1)
        layer = PeftLinear(nn.Linear(400, 50), "n", config=config, r=40, lora_alpha=1)
    theirs = layer.lora_A["n"].weight.detach().numpy()
    # 16,000 uniform draws: the largest comes within 0.1 % of the bound, the deviation within 1 % of bound / sqrt(3)
    assert np.abs(ours).max() == pytest.approx(0.05, rel=1e-3)
    assert np.abs(theirs).max() == pytest.approx(0.05, rel=1e-3)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.02)
