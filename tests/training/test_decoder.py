"""The lean decoder against transformers and automatic differentiation."""

import numpy as np
import pytest
import torch

from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, attach
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.cohort import CohortLora
from fedllm_flwr.models.soft import fixed_cache
from fedllm_flwr.training.decoder import NO_ADAPTERS, Adapters
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.stacks import LeanStack, make_stack

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
    whole = AdapterLayout(attach(backbone, spec).shapes, spec.rank)
    values = [0.3 * torch.randn(whole.size, generator=generator).numpy() for _ in range(clients)]
    cohort = CohortLora(backbone, spec, clients, side=side)
    lean = make_stack(backbone, spec, clients, side)
    assert isinstance(lean, LeanStack)
    for client, value in enumerate(values):
        cohort.load_flat(client, value)
        lean.load(client, value)
    with cohort:
        cohort.bind(range(clients))
        wanted = backbone.hidden(ids)
        wanted.backward(slope)
    found = lean.hidden(ids)
    lean.backward(found, slope)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for client, leaf in enumerate(cohort.leaves):
        [parameter] = lean.parameters(client)
        assert (parameter.grad - leaf.grad).norm() < 1e-5 * leaf.grad.norm()


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


def test_the_tape_holds_only_what_has_a_gradient_and_is_consumed(backbone: Backbone) -> None:
    decoder = find_decoder(backbone)
    assert decoder is not None
    for name, kept in (("model.layers.1.mlp.up_proj", 1), ("model.layers.0.mlp.up_proj", 2)):
        layer = backbone.linear_layers[name]
        pair = (torch.ones(1, 1, layer.in_features), torch.ones(1, layer.out_features, 1))
        slopes = {name: tuple(torch.full_like(value, torch.nan) for value in pair)}
        adapters = Adapters({name: pair}, 1.0)
        with torch.no_grad():
            states, tape = decoder.forward(torch.arange(6).view(1, 6), adapters, keep=True)
            assert len(tape.blocks) == kept
            decoder.backward(torch.ones_like(states), tape, adapters, slopes)
        assert tape.blocks == []
        assert all(bool(slope.isfinite().all()) for slope in slopes[name])


@pytest.mark.parametrize("behind", [0, 3])
def test_embeddings_get_their_gradient(backbone: Backbone, behind: int) -> None:
    """Also beside an adapter that sits only in the last block, and behind a text that is not computed again."""
    generator = torch.Generator().manual_seed(6)
    text, decoder = list(range(20, 20 + behind)), find_decoder(backbone)
    assert decoder is not None
    inputs = torch.randn(2, 5, backbone.hidden_size, generator=generator).requires_grad_()
    ahead = backbone.model.get_input_embeddings()(torch.tensor([text] * 2, dtype=torch.int64))
    whole = torch.cat([ahead, inputs], dim=1)
    wanted = backbone.model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state
    wanted = wanted[:, behind:]
    slope = torch.randn(wanted.shape, generator=generator)
    [wanted_slope] = torch.autograd.grad(wanted, inputs, slope)
    cache = fixed_cache(backbone, text)
    assert (cache is None) == (behind == 0)
    past = None if cache is None else cache.layers
    name = "model.layers.1.mlp.up_proj"
    layer = backbone.linear_layers[name]
    zero = (torch.zeros(1, 1, layer.in_features), torch.zeros(1, layer.out_features, 1))
    for adapters in (NO_ADAPTERS, Adapters({name: zero}, 1.0)):
        slopes = {name: tuple(torch.full_like(value, np.nan) for value in zero)}
        with torch.no_grad():
            found, tape = decoder.forward(inputs, adapters, keep=True, to_inputs=True, past=past)
            found_slope = decoder.backward(slope, tape, adapters, slopes)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (found_slope - wanted_slope).norm() < 1e-5 * wanted_slope.norm()


def test_tokens_are_their_embeddings(backbone: Backbone) -> None:
    ids = torch.arange(30).view(3, 10)
    decoder = find_decoder(backbone)
    assert decoder is not None
    with torch.no_grad():
        states, tape = decoder.forward(ids, NO_ADAPTERS, keep=True)
        embedded = backbone.model.get_input_embeddings()(ids)
        assert torch.equal(decoder.forward(embedded, NO_ADAPTERS)[0], states)
        assert decoder.backward(torch.ones_like(states), tape, NO_ADAPTERS, {}) is None


@pytest.mark.assets
@pytest.mark.slow
def test_the_default_model_is_served_in_its_own_dtype() -> None:
    real = load(ModelRef(name="smollm2_135m"))
    decoder = find_decoder(real)
    assert decoder is not None
    ids = torch.tensor([real.tokenizer("Oil prices rose on Monday.\nTopic:")["input_ids"]])
    with torch.no_grad():
        found, _ = decoder.forward(ids, Adapters({}, 1.0))
        wanted = real.hidden(ids)
        best = [real.head_weight() @ states[0, -1] for states in (found, wanted)]
    # bfloat16 rounds each of some hundred operations to 8 bits
    assert (found - wanted).float().norm() < 0.05 * wanted.float().norm()
    assert best[0].argmax() == best[1].argmax()
