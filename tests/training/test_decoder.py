"""The lean decoder against transformers and automatic differentiation."""

import pytest
import torch

from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cohort import CohortLora
from fedllm_flwr.training.decoder import Adapters, DecoderPass
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.flat import FlatFactors

TARGETS = [
    ("q_proj", "v_proj"),
    ("all-linear",),
    ("o_proj", "down_proj"),
    ("k_proj", "gate_proj"),
    ("model.layers.1.mlp.up_proj",),  # nothing in the first block needs a gradient
    ("model.layers.0.mlp.down_proj",),
]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("side", ["both", "a", "b"])
def test_states_and_gradients_are_those_of_transformers(
    backbone: Backbone, targets: tuple[str, ...], clients: int, side: str
) -> None:
    spec = LoraSpec(rank=2, alpha=3.0, target_modules=targets)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 300, (2 * clients, 7), generator=generator)
    slope = torch.randn(2 * clients, 7, backbone.hidden_size, generator=generator)
    cohort = CohortLora(backbone, spec, clients, side=side)
    flat = FlatFactors(backbone, spec, side)
    size = flat.trained_size + flat.frozen_size
    values = [0.3 * torch.randn(size, generator=generator).numpy() for _ in range(clients)]
    for client, value in enumerate(values):
        cohort.load_flat(client, value)
    with cohort:
        cohort.bind(range(clients))
        wanted = backbone.hidden(ids)
        wanted.backward(slope)
    halves = [flat.split(value) for value in values]
    trained = torch.stack([torch.from_numpy(one) for one, _ in halves]).requires_grad_()
    frozen = torch.stack([torch.from_numpy(other) for _, other in halves])
    found = DecoderPass.apply(trained, frozen, ids, find_decoder(backbone), flat)
    found.backward(slope)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    wanted_slope = torch.stack([leaf.grad for leaf in cohort.leaves])
    assert (trained.grad - wanted_slope).norm() < 1e-5 * wanted_slope.norm()


def test_without_adapters_it_is_the_plain_model(backbone: Backbone) -> None:
    ids = torch.arange(30).view(3, 10)
    decoder = find_decoder(backbone)
    assert decoder is not None
    with torch.no_grad():
        states, tape = decoder.forward(ids, Adapters({}, 1.0))
        torch.testing.assert_close(states, backbone.hidden(ids), rtol=1e-4, atol=1e-5)
    assert tape.blocks == []


def test_a_single_token(backbone: Backbone) -> None:
    decoder = find_decoder(backbone)
    assert decoder is not None
    ids = torch.tensor([[5]])
    with torch.no_grad():
        states, _ = decoder.forward(ids, Adapters({}, 1.0))
        torch.testing.assert_close(states, backbone.hidden(ids), rtol=1e-4, atol=1e-5)


def test_the_tape_is_consumed(backbone: Backbone) -> None:
    spec = LoraSpec(rank=2, alpha=3.0)
    flat = FlatFactors(backbone, spec, "both")
    trained = torch.zeros(1, flat.trained_size, requires_grad=True)
    frozen = torch.zeros(1, 0)
    ids = torch.arange(6).view(1, 6)
    states = DecoderPass.apply(trained, frozen, ids, find_decoder(backbone), flat)
    tape = states.grad_fn.parts[2]
    assert len(tape.blocks) == 2
    states.sum().backward()
    assert tape.blocks == []
