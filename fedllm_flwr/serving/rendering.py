"""From the turns of a chat, or a text, to token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.prompts import Prompt

Role = Literal["system", "user", "assistant"]
_MARK = "@@TURN-{}@@"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: Role
    content: str


def encode_chat(turns: Sequence[Turn], tokenizer: Any) -> list[int]:
    """A chat under the tokenizer's own template, up to where the assistant is to answer.

    What users write is tokenised apart and as plain text, so a special token that is spelled out in it cannot end
    their turn or fake another one.

    Args:
        turns: At least one.
        tokenizer: Of the model.

    Raises:
        ConfigError: The tokenizer has no chat template, or the template refuses, drops or repeats a turn.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "messages: the model has no chat template; send a prompt to /v1/completions"
        )
    marks = [_MARK.format(k) for k in range(len(turns))]
    marked = [{"role": t.role, "content": mark} for t, mark in zip(turns, marks, strict=True)]
    try:
        text = str(
            tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        )
    except TemplateError as error:
        raise ConfigError(f"messages: the model's chat template refuses them: {error}") from None
    ids: list[int] = []
    for mark, turn in zip(marks, turns, strict=True):
        if text.count(mark) != 1:
            raise ConfigError(
                f"messages: the model's chat template shows the {turn.role} turn {text.count(mark)} times"
            )
        before, _, text = text.partition(mark)
        ids += _special(before, tokenizer) + _literal(turn.content, tokenizer)
    return ids + _special(text, tokenizer)


def encode_task(turns: Sequence[Turn], prompt: Prompt) -> list[int]:
    """One user turn in the place of a row's text in a task's own question, as in training.

    Args:
        turns: Exactly one, the user's.
        prompt: The task's question on the model's tokenizer.

    Raises:
        ConfigError: There are other turns.
    """
    if [turn.role for turn in turns] != ["user"]:
        raise ConfigError(
            "messages: expected one user turn, whose text is put into the task's question, got "
            + ", ".join(turn.role for turn in turns)
        )
    [text] = prompt.text_tokens([turns[0].content])
    return [*prompt.before, *text, *prompt.after]


def encode_text(text: str, tokenizer: Any, leading_ids: Sequence[int] = ()) -> list[int]:
    """A plain text with the tokenizer's own leading tokens; special tokens may be spelled out in it.

    Args:
        text: To be continued.
        tokenizer: Of the model.
        leading_ids: Tokens that every prompt begins with, since a soft prompt stands behind them.

    Raises:
        ConfigError: The text does not begin with what these tokens say.
    """
    if not leading_ids:
        return list(tokenizer(text)["input_ids"])
    leading = tokenizer.decode(list(leading_ids))
    if not text.startswith(leading):
        raise ConfigError(
            f"prompt: expected it to begin with the text that the soft prompt stands behind, {leading!r}"
        )
    return [*leading_ids, *_special(text[len(leading) :], tokenizer)]


def _special(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _literal(text: str, tokenizer: Any) -> list[int]:
    if not text:
        return []
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(found["input_ids"])
