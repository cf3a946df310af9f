import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.models.tiny import tiny_config, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text())
def test_every_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_are_apart_and_fit_the_model() -> None:
    assert TOKENIZER.pad_token_id == tiny_config().pad_token_id == 0
    assert TOKENIZER.eos_token_id == tiny_config().eos_token_id == 1
    assert len(TOKENIZER) <= tiny_config().vocab_size


def test_words_with_other_first_letters_start_with_other_tokens() -> None:
    firsts = {TOKENIZER(f" {word}").input_ids[0] for word in ("earn", "acq", "trade", "grain")}
    assert len(firsts) == 4


def test_chat_template_marks_roles_and_opens_the_answer() -> None:
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_head_is_tied_and_attention_grouped() -> None:
    model = tiny_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.out_features < attention.q_proj.out_features
