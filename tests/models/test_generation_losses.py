"""Against the plain forward pass over the whole text, one continuation at a time."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models import generation_losses
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, attach, layer_shapes
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation import Adaptation, Generator
from fedllm_flwr.models.generation_losses import continuation_losses
from fedllm_flwr.prompts import PromptSpec, Segment

PROMPT = tuple(range(100, 112))
CONTINUATIONS = [(7, 8, 9), (300,), (12, 13, 14, 15, 16), (7, 8), (7, 8, 9)]


@torch.no_grad()
def by_hand(
    backbone: Backbone, prompt: tuple[int, ...], tokens: tuple[int, ...], soft: torch.Tensor | None
) -> np.ndarray:
    ids = torch.tensor([*prompt, *tokens])
    embedded = backbone.model.get_input_embeddings()(ids)
    if soft is not None:
        embedded = torch.cat([soft, embedded])
    logits = backbone.model(inputs_embeds=embedded[None]).logits[0, -len(tokens) - 1 : -1]
    losses = cross_entropy(logits, torch.tensor(tokens), reduction="none")
    return losses.double().numpy()


@pytest.mark.parametrize("positions", [1, 34, 8192])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
def test_losses_are_those_of_each_alone(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch, positions: int, prompt: tuple[int, ...]
) -> None:
    monkeypatch.setattr(generation_losses, "BATCH_POSITIONS", positions)
    found = continuation_losses(Generator(tiny), prompt, CONTINUATIONS)
    for tokens, losses in zip(CONTINUATIONS, found, strict=True):
        np.testing.assert_allclose(losses, by_hand(tiny, prompt, tokens, None), rtol=1e-5)


def test_they_are_of_the_adapted_model(tiny: Backbone) -> None:
    draws = np.random.default_rng(4)
    spec = LoraSpec(rank=2, alpha=4.0)
    size = AdapterLayout(layer_shapes(tiny.ref, spec.target_modules), 2).size
    factors = (0.2 * draws.standard_normal(size)).astype(np.float32)
    attached = attach(tiny, spec)
    attached.load_flat(factors)
    with attached.active(train=False):
        wanted = [by_hand(tiny, PROMPT, tokens, None) for tokens in CONTINUATIONS]
    found = continuation_losses(Generator(tiny, Adaptation(factors, spec)), PROMPT, CONTINUATIONS)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), rtol=1e-4)
    prompt = PromptSpec((Segment("shared", 3),), "before")
    values = draws.standard_normal(3 * tiny.hidden_size).astype(np.float32)
    soft = torch.from_numpy(values).view(3, -1)
    wanted = [by_hand(tiny, PROMPT, tokens, soft) for tokens in CONTINUATIONS]
    generator = Generator(tiny, Adaptation(values, prompt))
    for _ in range(2):  # the second time the soft prompt's keys are there already
        found = continuation_losses(generator, PROMPT, CONTINUATIONS)
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), rtol=1e-4)


def test_what_cannot_be_computed_is_refused(tiny: Backbone) -> None:
    assert continuation_losses(Generator(tiny), PROMPT, []) == []
    with pytest.raises(ConfigError, match="expected at least one token in each, got none"):
        continuation_losses(Generator(tiny), PROMPT, [(1,), ()])
    with pytest.raises(ConfigError, match="expected at most the 1024 positions"):
        continuation_losses(Generator(tiny), PROMPT, [(1,) * 1013])
