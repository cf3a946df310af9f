from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone, linear_layers
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.stacks import CohortStack, LeanStack, SingleStack, make_stack

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def wrap(backbone: Backbone, model: nn.Module) -> Backbone:
    """Another model in the same kernels."""
    model = model.eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    return replace(
        backbone,
        model=model,
        linear_layers=linear_layers(model),
        attached={},
        _head_rows={},
        _places={},
    )


def qwen(**options: object) -> Qwen2ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, **options))
        for name, parameter in model.named_parameters():
            if "bias" in name:  # zero at the start, and would not be missed
                nn.init.normal_(parameter)
    return model


@contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def test_the_tiny_llama_is_served_and_looked_at_once(backbone: Backbone) -> None:
    assert find_decoder(backbone) is not None
    assert find_decoder(backbone) is find_decoder(backbone)


def test_a_model_with_the_same_parts_and_biases_is_served(backbone: Backbone) -> None:
    assert find_decoder(wrap(backbone, qwen())) is not None


def test_a_sliding_window_is_not_served(backbone: Backbone) -> None:
    windowed = qwen(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert find_decoder(wrap(backbone, windowed)) is None


def test_other_parts_are_not_served(backbone: Backbone) -> None:
    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    assert find_decoder(wrap(backbone, GPT2LMHeadModel(config))) is None


def test_the_same_parts_that_compute_otherwise_are_not_served(backbone: Backbone) -> None:
    model = qwen()
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert find_decoder(wrap(backbone, model)) is None


def test_fused_attention_is_left_to_transformers(backbone: Backbone) -> None:
    long = replace(backbone, kernels=replace(backbone.kernels, attention="sdpa"))
    assert find_decoder(long) is None


@pytest.mark.parametrize(
    ("dropout", "plain_layers", "clients", "kind"),
    [
        (0.0, True, 1, LeanStack),
        (0.0, True, 2, LeanStack),
        (0.1, True, 1, SingleStack),
        (0.0, False, 1, SingleStack),
        (0.0, False, 2, CohortStack),
    ],
)
def test_what_the_lean_decoder_cannot_do_goes_through_transformers(
    backbone: Backbone, dropout: float, plain_layers: bool, clients: int, kind: type
) -> None:
    spec = LoraSpec(rank=2, alpha=2.0, dropout=dropout)
    stack = make_stack(backbone, spec, clients, "both", plain_layers=plain_layers)
    assert type(stack) is kind
