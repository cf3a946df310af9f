"""A template on a tokenizer: the tokens before a row's text, of the text, after it, and of an answer.

The pieces are tokenised apart. So a long text can be cut without touching the question, and a special token
that is spelled out in a row stays ordinary text: it cannot end the user's turn or fake an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jinja2 import TemplateError

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Template

MARK = "@@ROW-TEXT@@"
PLAIN_CUE = "\n\nAnswer:"
"""Follows the question where a chat is wanted and the tokenizer has no chat template."""


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    chat_template: Any
    eos_token_id: Any

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenise one text or a list of texts."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render the turns of a conversation."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """The text of token ids."""


class Prompt:
    """One template, rendered and tokenised around the place of the row's text.

    Attributes:
        before: Token ids before the text, with the tokenizer's own leading tokens.
        after: Token ids after the text: the rest of the question and the answer cue.

    Args:
        template: What to ask.
        tokenizer: The model's tokenizer.

    Raises:
        ConfigError: The tokenizer's chat template drops or repeats the question.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        chat = template.chat and bool(tokenizer.chat_template)
        rendered = _chat_text(template, tokenizer) if chat else _plain_text(template)
        if rendered.count(MARK) != 1:
            raise ConfigError(
                f"template {template.name}: expected the tokenizer's chat template to show the "
                f"question once, got it {rendered.count(MARK)} times"
            )
        prefix, suffix = rendered.split(MARK)
        # Byte-pair vocabularies join a word with the space before it, and split line breaks before a
        # word otherwise than at an end, so white space between two pieces belongs to the later one.
        stripped = prefix.rstrip()
        self._space = prefix[len(stripped) :]
        start = [] if chat else self._leading_tokens()  # a chat template writes its own
        self.before = [*start, *self._special(stripped)]
        self.after = self._special(suffix)
        self._anchor, self._joint = ("\n", "") if suffix[-1:].isspace() else (":", " ")
        self._anchor_tokens = self._literal([self._anchor])[0]

    def text_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of row texts in their place; nothing in them counts as a special token."""
        return self._literal([self._space + text for text in texts]) if texts else []

    def answer_tokens(self, answer: str) -> list[int]:
        """Token ids of an answer in its place after the cue.

        It is tokenised behind an anchor that ends as the cue does, because some tokenizers add a
        space to whatever comes first.
        """
        joined, alone = self._literal([self._anchor + self._joint + answer, self._joint + answer])
        length = len(self._anchor_tokens)
        return joined[length:] if joined[:length] == self._anchor_tokens else alone

    def _leading_tokens(self) -> list[int]:
        """What the tokenizer puts before a text, such as a begin-of-sequence token."""
        whole = list(self._tokenizer("a")["input_ids"])
        bare = self._special("a")
        starts = range(len(whole) - len(bare) + 1)
        found = [start for start in starts if whole[start : start + len(bare)] == bare]
        return whole[: found[0]] if found else []

    def _special(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _literal(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [list(token_ids) for token_ids in found["input_ids"]]


def _plain_text(template: Template) -> str:
    system = f"{template.system}\n\n" if template.system else ""
    cue = PLAIN_CUE if template.chat else ""
    return system + template.text.replace("{text}", MARK) + cue


def _chat_text(template: Template, tokenizer: Tokenizer) -> str:
    question = template.text.replace("{text}", MARK)
    turns = [{"role": "user", "content": question}]
    options = {"tokenize": False, "add_generation_prompt": True}
    if not template.system:
        return str(tokenizer.apply_chat_template(turns, **options))
    system = {"role": "system", "content": template.system}
    try:
        return str(tokenizer.apply_chat_template([system, *turns], **options))
    except TemplateError:  # some chat templates refuse a system turn
        turns = [{"role": "user", "content": f"{template.system}\n\n{question}"}]
        return str(tokenizer.apply_chat_template(turns, **options))
