"""Soft prompts against embeddings that are put together row by row, without padding and without a mask."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone, linear_layers
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.soft import (
    MAX_FIXED_TEXTS,
    FixedCache,
    SoftInputs,
    check_window,
    continued,
    embedding_width,
    fixed_cache,
    soft_inputs,
)

ROWS = ([5, 17, 260, 9, 33, 8], [40, 41, 42], [7, 6, 5, 4, 3])
LENGTH = 2


def wrap(backbone: Backbone, model: nn.Module) -> Backbone:
    """Another model in the same kernels."""
    model = model.eval().requires_grad_(False)
    return replace(
        backbone,
        model=model,
        linear_layers=linear_layers(model),
        attached={},
        _head_rows={},
        _places={},
    )


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64,
            initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tiny: Backbone) -> Backbone:
    """Rotary positions, or learned absolute ones."""
    return tiny if request.param == "llama" else wrap(tiny, gpt2())


def prompts_of(backbone: Backbone, rows: int = len(ROWS)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (rows, LENGTH, embedding_width(backbone))
    return (0.3 * torch.randn(size, generator=generator)).requires_grad_()


def padded(rows: Sequence[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if side == "left" else one + pad for one, pad in zip(ones, pads, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def reference(backbone: Backbone, row: list[int], prompt: Tensor, at: int) -> Tensor:
    """States [t, h] of one row's own tokens, its embeddings and the prompt's being all that the model sees."""
    embedded = backbone.model.get_input_embeddings()(torch.tensor(row))
    whole = torch.cat([embedded[:at], prompt, embedded[at:]])[None]
    states = backbone.model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state[0]
    return torch.cat([states[:at], states[at + len(prompt) :]])


def states_of(backbone: Backbone, found: SoftInputs) -> Tensor:
    output = backbone.model.base_model(
        inputs_embeds=found.inputs_embeds,
        attention_mask=found.attention_mask,
        position_ids=found.position_ids,
        use_cache=False,
    )
    return found.states_of_tokens(output.last_hidden_state)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_states_and_gradients_are_those_of_rows_by_themselves(
    model: Backbone, padding: str, at: int
) -> None:
    ids, mask = padded(ROWS, padding)
    prompts = prompts_of(model)
    found = soft_inputs(model, ids, mask, prompts, at=at, padding=padding)
    states = states_of(model, found)
    wanted = torch.cat(
        [reference(model, row, prompt, at) for row, prompt in zip(ROWS, prompts, strict=True)]
    )
    own = states[mask.bool()]
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    slope = torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    [gradient] = torch.autograd.grad(own, prompts, slope, retain_graph=True)
    [wanted_gradient] = torch.autograd.grad(wanted, prompts, slope)
    assert (gradient - wanted_gradient).norm() < 1e-4 * wanted_gradient.norm()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_wrong_place_mask_or_position_shows(model: Backbone, padding: str) -> None:
    """The comparison above notices each mistake that can be made."""
    ids, mask = padded(ROWS, padding)
    prompts = prompts_of(model).detach()
    right = soft_inputs(model, ids, mask, prompts, at=1, padding=padding)
    seen = torch.ones_like(right.attention_mask)
    wrong = {
        "place": soft_inputs(model, ids, mask, prompts, at=2, padding=padding),
        "read at": replace(right, places=torch.arange(ids.shape[1]).expand_as(ids)),
    }
    if padding == "left":  # on the right, causal attention hides the padding anyway
        wrong["mask"] = replace(right, attention_mask=seen)
        counted = torch.arange(seen.shape[1]).expand_as(seen)
        absolute = model.model.config.model_type == "gpt2"  # a rotation sees only distances
        wrong |= {"position": replace(right, position_ids=counted)} if absolute else {}
    own = states_of(model, right)[mask.bool()]
    for name, found in wrong.items():
        off = (states_of(model, found)[mask.bool()] - own).norm() / own.norm()
        assert off > 0.01, name


def test_inputs_by_hand(tiny: Backbone) -> None:
    ids, mask = padded([[5, 6, 7], [8]], "left")
    prompts = prompts_of(tiny, 2).detach()
    found = soft_inputs(tiny, ids, mask, prompts, at=1, padding="left")
    assert found.places.tolist() == [[0, 3, 4], [0, 1, 2]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert torch.equal(found.inputs_embeds[0, 1:3], prompts[0])
    assert torch.equal(found.inputs_embeds[1, 3:], prompts[1])
    table = tiny.model.get_input_embeddings().weight
    assert torch.equal(found.inputs_embeds[:, 0], table[[5, 0]])
    ids, mask = padded([[5, 6, 7], [8]], "right")
    found = soft_inputs(tiny, ids, mask, prompts, at=1, padding="right")
    assert found.places.tolist() == [[0, 3, 4], [0, 3, 4]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_the_model_s_dtype_is_kept_and_no_mask_is_no_padding(tiny: Backbone) -> None:
    ids = torch.tensor(ROWS[:1])
    prompts = prompts_of(tiny, 1).detach().double()
    found = soft_inputs(tiny, ids, None, prompts, at=0, padding="right")
    assert found.inputs_embeds.dtype == torch.float32
    assert bool((found.attention_mask == 1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": 4}, "expected a place from 0 to 3, the tokens of the shortest row, got 4"),
        ({"at": -1}, "expected a place from 0 to 3"),
        ({"padding": "left"}, "expected padding on the left only"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention mask: expected \[3, 6\], got \[2, 6\]"),
        ({"prompts": torch.zeros(3, 2, 5)}, r"expected \[3, length, 64\], got \[3, 2, 5\]"),
        ({"prompts": torch.zeros(2, 2, 64)}, r"expected \[3, length, 64\], got \[2, 2, 64\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    tiny: Backbone, change: dict[str, Any], message: str
) -> None:
    ids, mask = padded(ROWS, "right")
    arguments = {
        "attention_mask": mask, "prompts": prompts_of(tiny), "at": 1, "padding": "right",
    } | change  # fmt: skip
    with pytest.raises(ShapeError, match=message):
        soft_inputs(tiny, ids, **arguments)


def test_states_behind_a_cached_text_are_those_of_the_whole(model: Backbone) -> None:
    text, rest = [5, 6, 7], torch.tensor([[9, 30, 31, 32], [40, 41, 42, 43]])
    cache = fixed_cache(model, text)
    assert cache is not None
    assert cache.length == 3
    embedded = model.model.get_input_embeddings()(rest)
    whole = torch.cat([torch.tensor([text, text]), rest], dim=1)
    wanted = model.hidden(whole)[:, 3:]
    for _ in range(2):  # a call does not write to the cache
        found = continued(model, embedded, cache)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_fixed_text_is_computed_once_and_the_latest_ones_are_kept(tiny: Backbone) -> None:
    own = wrap(tiny, tiny.model)
    assert fixed_cache(own, ()) is None
    caches: list[FixedCache | None] = [fixed_cache(own, (k, 3)) for k in range(MAX_FIXED_TEXTS)]
    assert fixed_cache(own, (0, 3)) is caches[0]
    fixed_cache(own, (200, 3))  # one too many: the text that was not asked for the longest goes
    assert fixed_cache(own, (0, 3)) is caches[0]
    assert fixed_cache(own, (2, 3)) is caches[2]
    assert fixed_cache(own, (1, 3)) is not caches[1]


def sliding() -> MistralForCausalLM:
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=4,
        )
    )


def recurrent() -> MambaForCausalLM:
    return MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    )


@pytest.mark.parametrize("make", [sliding, recurrent])
def test_a_model_that_keeps_more_than_keys_and_values_has_no_cache(
    tiny: Backbone, make: Callable[[], nn.Module]
) -> None:
    with torch.random.fork_rng(devices=[]):
        assert fixed_cache(wrap(tiny, make()), (5, 6)) is None


def test_a_prompt_longer_than_the_context_window_is_refused() -> None:
    ref = ModelRef("tiny")
    check_window(ref, 4, 1020)
    with pytest.raises(
        ConfigError,
        match="expected at most the 1024 positions of its context window, "
        "got 5 soft tokens and rows of up to 1020 tokens",
    ):
        check_window(ref, 5, 1020)
