"""The transform that is found must be the one that the architecture applies, for architectures that differ in it."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MiniCPM3Config,
)

from fedllm_flwr.models.heads import find_transform, full_logits
from fedllm_flwr.models.loss import LogitTransform

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[Any, LogitTransform]] = {
    "llama": (LlamaConfig(**SIZES), LogitTransform()),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=2.0), LogitTransform(softcap=2.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.0625), LogitTransform(scale=0.0625)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), LogitTransform(scale=0.125)),
    "gptj": (
        GPTJConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=2, rotary_dim=8),
        LogitTransform(),
    ),
    "gpt2": (
        GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
        LogitTransform(),
    ),
}


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(dtype).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    if getattr(head, "bias", None) is not None:
        head.bias.normal_(0, 1.0, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_finds_the_transform(name: str, dtype: torch.dtype) -> None:
    config, expected = CONFIGS[name]
    assert find_transform(build(config, dtype)) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_full_logits_are_the_models_own(name: str) -> None:
    model = build(CONFIGS[name][0])
    input_ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
        torch.testing.assert_close(full_logits(model, hidden), logits)


def test_unknown_transform_is_reported_as_none() -> None:
    model = build(LlamaConfig(**SIZES))
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output**3)
    assert find_transform(model) is None


def test_scale_of_the_hidden_state_counts_as_scale_of_the_logits() -> None:
    sizes = {**SIZES, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    del sizes["head_dim"]
    config = MiniCPM3Config(**sizes, v_head_dim=8, q_lora_rank=8, kv_lora_rank=8, dim_model_base=16)
    transform = find_transform(build(config))
    assert transform is not None
    assert transform.scale == pytest.approx(0.5)  # 1 / (hidden_size / dim_model_base)


def test_full_logits_let_gradients_through_and_remove_their_hook() -> None:
    model = build(LlamaConfig(**SIZES))
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = full_logits(model, hidden)
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.t())
    logits.sum().backward()
    assert hidden.grad is not None
    assert not model.base_model._forward_hooks
