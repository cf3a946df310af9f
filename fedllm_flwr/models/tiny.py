"""The model for tests: a 2-layer Llama with seeded random weights and a byte-level tokenizer, made without any file.

It has the features that break careless code: grouped-query attention (key and value layers are narrower
than the rest), a head tied to the embedding, a pad token that is not the end token, and a chat template.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le "
    "ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"
)
_SPACE = "Ġ"  # how byte-level tokenizers spell a space


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer for every text; a space joins the letter after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(_SPACE, letter) for letter in _LETTERS] + [
        (pair[0], pair[1]) for pair in _PAIRS.split()
    ]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def tiny_config(vocab_size: int = 512) -> LlamaConfig:
    """The tiny model's configuration.

    Args:
        vocab_size: Rows of the embedding; at least the tokenizer's length.

    Returns:
        Weights of standard deviation 0.15 instead of 0.02, so that the random model's outputs differ visibly between
        tokens and a LoRA of small rank can learn with it.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """The tiny model in float32; the same seed gives the same weights, and the global generators are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config())
