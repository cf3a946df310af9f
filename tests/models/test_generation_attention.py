from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation_attention import (
    GROUPED,
    generation_kernels,
    grouped_attention,
    plain_products,
)


@pytest.mark.parametrize("length", [1, 3])
def test_it_is_softmax_of_scaled_products(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, length, 5)
    mask[0, :, :, :2] = torch.finfo(torch.float32).min
    before = query.clone(), mask.clone()
    mixed, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask, 0.3)
    for row in range(2):
        for head in range(4):
            scores = 0.3 * query[row, head] @ key[row, head // 2].T + mask[row, 0]
            torch.testing.assert_close(
                mixed[row, :, head], scores.softmax(-1) @ value[row, head // 2]
            )
    assert torch.equal(query, before[0])
    assert torch.equal(mask, before[1])


def test_plain_products_end_with_their_block() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with plain_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_backbone_has_its_own_attention_back(tiny: Backbone) -> None:
    own = tiny.model.config._attn_implementation
    seen = []

    def compute() -> None:
        with generation_kernels(tiny):
            seen.append(tiny.model.config._attn_implementation)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        compute()
    assert seen == [GROUPED]
    assert tiny.model.config._attn_implementation == own != GROUPED


def test_a_model_that_computes_otherwise_keeps_its_attention(tiny: Backbone) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, attn_logit_softcapping=0.01, initializer_range=0.5,
            attn_implementation="eager",
        )  # fmt: skip
        model = Gemma2ForCausalLM(config).eval()
    capped = replace(tiny, model=model, linear_layers={}, attached={}, _head_rows={}, _places={})
    with generation_kernels(capped):
        assert model.config._attn_implementation == "eager"
