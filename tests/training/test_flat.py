import numpy as np
import pytest
import torch

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.flat import FlatFactors


@pytest.mark.parametrize("side", ["both", "a", "b"])
def test_views_are_the_layout_s_factors(
    backbone: Backbone, spec: LoraSpec, layout: AdapterLayout, side: str
) -> None:
    flat = FlatFactors(backbone, spec, side)
    values = [np.arange(layout.size, dtype=np.float32) + k for k in range(2)]
    halves = [flat.split(value) for value in values]
    for (trained, frozen), value in zip(halves, values, strict=True):
        assert (len(trained), len(frozen)) == (flat.trained_size, flat.frozen_size)
        assert np.array_equal(flat.join(trained, frozen), value)
    trained = torch.stack([torch.from_numpy(one) for one, _ in halves])
    frozen = torch.stack([torch.from_numpy(other) for _, other in halves])
    factors = flat.factors(trained, frozen)
    for client, value in enumerate(values):
        wanted = layout.unpack(value, spec.scaling)
        assert set(factors) == set(wanted)
        for name, (lora_a, lora_b) in factors.items():
            assert np.array_equal(lora_a[client].numpy(), wanted[name].lora_a)
            assert np.array_equal(lora_b[client].numpy(), wanted[name].lora_b)
    for name, (slope_a, slope_b) in flat.slopes(trained).items():
        for own, slope, view in (
            ("a", slope_a, factors[name][0]),
            ("b", slope_b, factors[name][1]),
        ):
            assert (slope is None) == (side not in ("both", own))
            assert slope is None or slope.data_ptr() == view.data_ptr()


def test_a_wrong_size_is_named(backbone: Backbone, spec: LoraSpec) -> None:
    flat = FlatFactors(backbone, spec, "b")
    with pytest.raises(ShapeError, match=r"flat adapter: expected \(\d+,\), got \(3,\)"):
        flat.split(np.zeros(3, dtype=np.float32))
