"""The bodies of responses, whole and streamed, in OpenAI's form."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fedllm_flwr.serving.answering import Reply
from fedllm_flwr.serving.protocol import ApiError, ChatRequest, Common, finish_reason, usage
from fedllm_flwr.serving.service import Part

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Envelope:
    """What all parts of one response have.

    Attributes:
        request: What was asked.
        id: A new name.
        created: Seconds since 1970.
    """

    request: Common
    id: str = field(default_factory=lambda: f"fedllm-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether answers are messages."""
        return isinstance(self.request, ChatRequest)

    def whole(self, replies: list[Reply]) -> dict[str, Any]:
        """A body with all answers: those to the first prompt, then those to the next one."""
        answers = [
            (text, finish)
            for reply in replies
            for text, finish in zip(reply.texts, reply.finishes, strict=True)
        ]
        choices = [
            self._choice(k, text, finish_reason(finish), part="message")
            for k, (text, finish) in enumerate(answers)
        ]
        return {**self._head(""), "choices": choices, "usage": usage(replies)}

    def chunk(self, index: int, text: str | None, finish: str | None) -> bytes:
        """One event of a stream: more text of an answer, or its end."""
        body = {
            **self._head(".chunk"),
            "choices": [self._choice(index, text, finish, part="delta")],
        }
        return event(body)

    def last(self, replies: list[Reply]) -> bytes:
        """The event with the tokens, which has no choices."""
        return event({**self._head(".chunk"), "choices": [], "usage": usage(replies)})

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.request.model,
        }  # fmt: skip

    def _choice(
        self, index: int, text: str | None, finish: str | None, *, part: str
    ) -> dict[str, Any]:
        if self.is_chat:
            said = {} if text is None else {"role": "assistant", "content": text}
            return {"index": index, part: said, "finish_reason": finish, "logprobs": None}
        return {"index": index, "text": text or "", "finish_reason": finish, "logprobs": None}


async def events(envelope: Envelope, parts: AsyncIterator[Part]) -> AsyncIterator[bytes]:
    """A stream of answers as server-sent events; an error on the way is the last event.

    Args:
        envelope: Of the response.
        parts: As :meth:`fedllm_flwr.serving.service.Service.stream` gives them.
    """
    samples = envelope.request.n or 1
    sent: dict[int, str] = {}
    try:
        async for part in parts:
            if isinstance(part, list):
                for event_ in _endings(envelope, part, sent, samples):
                    yield event_
                continue
            prompt, sample, text = part
            index = prompt * samples + sample
            more = text[len(sent.get(index, "")) :]
            if more or index not in sent:
                sent[index] = text
                yield envelope.chunk(index, more, None)
    except ApiError as error:
        yield event(error.body())
        return
    yield DONE


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _endings(
    envelope: Envelope, replies: list[Reply], sent: dict[int, str], samples: int
) -> list[bytes]:
    """What is left of each answer, why it ended, and the tokens if they are wanted."""
    found = []
    for prompt, reply in enumerate(replies):
        for sample, (text, finish) in enumerate(zip(reply.texts, reply.finishes, strict=True)):
            index = prompt * samples + sample
            more = text[len(sent.get(index, "")) :]
            if more:
                found.append(envelope.chunk(index, more, None))
            found.append(envelope.chunk(index, None, finish_reason(finish)))
    options = envelope.request.stream_options
    if options is not None and options.include_usage:
        found.append(envelope.last(replies))
    return found
