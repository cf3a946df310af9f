import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fedllm_flwr.serving.answering import Reply
from fedllm_flwr.serving.protocol import ApiError, CompletionRequest
from fedllm_flwr.serving.service import Part
from fedllm_flwr.serving.shapes import DONE, Envelope, event, events

REPLIES = [Reply(("ab", "cd"), ("stop", "length"), 1, 2, "t", None, 3.0),
           Reply(("ef", ""), ("stop", "stop"), 1, 2, "t", None, 3.0)]  # fmt: skip


def play(parts: list[Part | ApiError], **options: Any) -> list[bytes]:
    request = CompletionRequest(model="m", prompt=["x", "y"], n=2, stream=True, **options)

    async def given() -> AsyncIterator[Part]:
        for part in parts:
            if isinstance(part, ApiError):
                raise part
            yield part

    async def run() -> list[bytes]:
        return [piece async for piece in events(Envelope(request), given())]

    return asyncio.run(run())


def read(pieces: list[bytes]) -> list[Any]:
    return [json.loads(piece.removeprefix(b"data: ")) for piece in pieces]


def test_answers_are_numbered_prompt_by_prompt() -> None:
    body = Envelope(CompletionRequest(model="m", prompt=["x", "y"], n=2)).whole(REPLIES)
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "ab", "stop"), (1, "cd", "length"), (2, "ef", "stop"), (3, "", "stop"),
    ]  # fmt: skip


def test_a_stream_joins_to_the_whole_answers_whatever_was_heard_on_the_way() -> None:
    *pieces, done = play([(0, 0, "a"), (1, 0, ""), (0, 1, "c"), (0, 1, "cd"), (1, 0, "e"), REPLIES])
    assert done == DONE
    texts, ends = ["", "", "", ""], {}
    for body in read(pieces):
        [choice] = body["choices"]
        assert choice["index"] not in ends, "nothing follows an end"
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == ["ab", "cd", "ef", ""]
    assert ends == {0: "stop", 1: "length", 2: "stop", 3: "stop"}


def test_an_error_on_the_way_is_the_last_event() -> None:
    pieces = play([(0, 0, "a"), ApiError(504, "too late", "timeout")])
    assert read(pieces)[-1]["error"]["code"] == "timeout"
    assert DONE not in pieces


def test_an_event_is_one_line() -> None:
    assert event({"text": "a\nb"}).count(b"\n") == 2
