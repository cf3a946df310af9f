from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation_start import (
    Adaptation,
    GrowingLayer,
    new_cache,
    start_of,
    window_of,
)
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, attach_prompt, flat_size
from fedllm_flwr.prompts import PromptSpec, Segment

TOKENS = torch.tensor([[30, 31, 32, 33]])
REF = ModelRef("tiny")


@torch.no_grad()
def states(backbone: Backbone, adaptation: Adaptation) -> torch.Tensor:
    """Of tokens that go on from what stands before them."""
    cache = new_cache(backbone, start_of(backbone, adaptation))
    output = backbone.model.base_model(input_ids=TOKENS, past_key_values=cache, use_cache=True)
    return output.last_hidden_state


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_peft_prompts_stand_before_the_tokens_as_in_training(kind: str, tiny: Backbone) -> None:
    spec = PeftPromptSpec(kind, 3)  # type: ignore[arg-type]
    flat = np.random.default_rng(0).standard_normal(flat_size(REF, spec), dtype=np.float32)
    attached = attach_prompt(tiny, spec)
    attached.values.load(flat)
    wanted = attached.hidden(TOKENS).detach()
    torch.testing.assert_close(states(tiny, Adaptation(flat, spec)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("placement", "fixed"), [("before", ()), ("after", (9, 8))])
def test_a_soft_prompt_stands_where_it_was_trained(
    placement: str, fixed: tuple[int, ...], tiny: Backbone
) -> None:
    spec = PromptSpec((Segment("shared", 2),), placement)  # type: ignore[arg-type]
    flat = np.random.default_rng(1).standard_normal(2 * tiny.hidden_size, dtype=np.float32)
    table = tiny.model.get_input_embeddings()
    with torch.no_grad():
        ahead = [table(torch.tensor(fixed, dtype=torch.long)), torch.from_numpy(flat).view(2, -1)]
        whole = torch.cat([*ahead, table(TOKENS[0])])[None]
        wanted = tiny.model.base_model(inputs_embeds=whole).last_hidden_state[:, -4:]
    adaptation = Adaptation(flat, spec, fixed_ids=(9, 8))
    assert adaptation.leading_ids == fixed
    torch.testing.assert_close(states(tiny, adaptation), wanted, rtol=1e-4, atol=1e-4)


def test_nothing_stands_before_the_tokens_of_a_plain_model(tiny: Backbone) -> None:
    assert start_of(tiny, Adaptation()) == ()
    wanted = tiny.model.base_model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(states(tiny, Adaptation()), wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(tiny: Backbone) -> None:
    spec = PromptSpec((Segment("shared", 2),), "before")
    with pytest.raises(ShapeError, match=r"soft prompt: expected \(128,\) values, got \(3,\)"):
        start_of(tiny, Adaptation(np.zeros(3, np.float32), spec))
    for given in ({"adapter": np.zeros(3, np.float32)}, {"spec": spec}):
        with pytest.raises(ConfigError, match="expected an adapter and its settings, got"):
            Adaptation(**given)  # type: ignore[arg-type]


def test_a_window_is_known_and_a_recurrent_state_is_refused(tiny: Backbone) -> None:
    assert window_of(tiny) is None
    small = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
    blank = {"linear_layers": {}, "attached": {}, "_head_rows": {}, "_places": {}}
    config = MistralConfig(
        **small,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=5,
    )
    assert window_of(replace(tiny, model=MistralForCausalLM(config), **blank)) == 5
    mamba = MambaForCausalLM(MambaConfig(**small, state_size=4, num_heads=2))
    with pytest.raises(ConfigError, match="expected layers that keep keys and values, got"):
        window_of(replace(tiny, model=mamba, **blank))


@pytest.mark.parametrize("pieces", [[3], [1] * 40, [30, 1, 40, 1, 1]])
def test_a_growing_layer_holds_what_transformers_own_holds(pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for step, length in enumerate(pieces):
        rows = len(ours.keys) if step else 3
        new = [torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2)]
        for found, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, wanted)
        if step == 1:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([2, 0]))
    assert ours.get_seq_length() == theirs.get_seq_length() == sum(pieces)


def test_a_cache_does_not_change_what_it_began_with(tiny: Backbone) -> None:
    spec = PromptSpec((Segment("shared", 2),), "before")
    flat = np.random.default_rng(1).standard_normal(2 * tiny.hidden_size, dtype=np.float32)
    start = start_of(tiny, Adaptation(flat, spec))
    copies = [(keys.clone(), values.clone()) for keys, values in start]
    with torch.no_grad():
        tiny.model.base_model(
            input_ids=TOKENS, past_key_values=new_cache(tiny, start), use_cache=True
        )
    for pair, copy in zip(start, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, copy, strict=True))
