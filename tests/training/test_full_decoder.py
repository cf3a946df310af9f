from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.decoder import NO_ADAPTERS
from fedllm_flwr.training.full_decoder import hooked_decoder
from fedllm_flwr.training.full_layers import hooked, weight_of

IDS = torch.tensor([[5, 9, 100, 7, 31], [8, 8, 2, 250, 0]])
Factors = dict[str, tuple[Tensor, Tensor]]


def receivers(found: Factors, names: list[str]) -> dict[str, Callable[[Tensor, Tensor], None]]:
    def keep(name: str) -> Callable[[Tensor, Tensor], None]:
        return lambda slope, inputs: found.__setitem__(name, (slope.clone(), inputs.clone()))

    return {name: keep(name) for name in names}


@pytest.mark.parametrize(
    "targets", [("all-linear",), ("down_proj",), ("model.layers.1.self_attn.k_proj",)]
)
def test_the_factors_are_those_of_autograd(backbone: Backbone, targets: tuple[str, ...]) -> None:
    layers = backbone.target_layers(targets)
    found: Factors = {}
    wanted: Factors = {}
    weights = {name: weight_of(layer) for name, layer in layers.items()}
    with hooked(backbone, weights, receivers(wanted, list(layers))):
        states = backbone.hidden(IDS)
        slope = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        states.backward(slope)
    decoder = hooked_decoder(backbone)
    with torch.no_grad():
        ours, tape = decoder.forward(IDS, NO_ADAPTERS, keep=True, to_inputs=True)
        decoder.factors(slope, tape, receivers(found, list(layers)))
    assert torch.allclose(ours, states, rtol=1e-4, atol=1e-5)
    assert tape.blocks == []
    # the last layer comes first, and layers below the lowest one that is asked for never
    assert [name.split(".")[2] for name in found] == sorted(
        (name.split(".")[2] for name in layers), reverse=True
    )
    assert set(found) == set(wanted) == set(layers)
    for name, pair in found.items():
        for one, other in zip(pair, wanted[name], strict=True):
            assert (one - other).norm() < 1e-4 * other.norm()


def test_other_models_have_none(backbone: Backbone) -> None:
    other = replace(backbone, kernels=replace(backbone.kernels, attention="sdpa"))
    assert hooked_decoder(other) is None
