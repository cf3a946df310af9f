"""Bodies of requests: their size, their coming, and what is wrong in them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from fedllm_flwr.serving.answering import SingleModel
from fedllm_flwr.serving.app import create_app

Fixture = Callable[..., Any]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


def asked(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "tiny-run", "messages": [{"role": "user", "content": text}], "max_tokens": 8,
            "temperature": 0, **options}  # fmt: skip


@pytest.mark.parametrize("length", [2_000, None])
def test_a_body_that_is_too_long_is_not_read_to_its_end(
    length: int | None, echo: Any, speak: Fixture
) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        for place in range(100):
            read.append(place)
            yield b" " * 20

    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        announced = {} if length is None else {"content-length": str(length)}
        headers = {"content-type": "application/json", **announced}
        return await client.post(PLAIN, content=body(), headers=headers)

    response = speak(echo, scene, max_body_bytes=100)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_long")
    assert read == (list(range(6)) if length is None else [])


def test_a_body_of_just_the_allowed_length_is_read(echo: Any, speak: Fixture) -> None:
    body = b'{"model": "echo", "prompt": "abc"}'

    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(PLAIN, content=body, headers={"content-type": "application/json"})

    assert speak(echo, scene, max_body_bytes=len(body)).status_code == 200


def test_a_body_that_does_not_come_is_408(echo: Any, speak: Fixture) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return await client.post(PLAIN, content=body(), headers=headers)

    response = speak(echo, scene, timeout_seconds=0.1)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")


def test_a_client_that_goes_away_in_its_body_is_no_fault_of_the_server(
    echo: Any, config: Fixture
) -> None:
    told: list[dict[str, Any]] = []
    scope = {"type": "http", "method": "POST", "path": PLAIN, "query_string": b"",
             "headers": [(b"content-type", b"application/json")]}  # fmt: skip

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        told.append(message)

    asyncio.run(create_app(echo, config())(scope, receive, send))
    assert told[0]["status"] == 499


WRONG: list[tuple[Any, int, str]] = [
    (b"", 400, "expected one JSON object"),
    (b"{", 400, "expected one JSON object"),
    (b"[1]", 400, "expected a JSON object"),
    (b"\xff{}", 400, "expected one JSON object"),
    (b"[" * 100_000, 400, "expected one JSON object"),
    (
        b'{"model": "tiny-run", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "surrogates",
    ),
    ({"messages": []}, 400, "model: Field required"),
    (asked("x", messages=[]), 400, "messages: List should have at least 1 item"),
    (asked("x", messages="hello"), 400, "messages: Input should be a valid list"),
    (asked("x", messages=[{"role": "robot", "content": "x"}]), 400, "messages.0.role"),
    (asked("x", model="gpt-4"), 404, "model: expected 'tiny-run', got 'gpt-4'"),
    (asked("x", temperature="hot"), 400, "temperature: Input should be a valid number"),
    (asked("x", temperature=3), 400, "temperature: Input should be less than or equal to 2"),
    (asked("x", top_p=0), 400, "top_p: Input should be greater than 0"),
    (asked("x", max_tokens=0), 400, "max_tokens: Input should be greater than or equal to 1"),
    (asked("x", max_tokens=65), 400, "max_tokens: expected at most 64, got 65"),
    (asked("x", n=9), 400, "n: expected at most 8, got 9"),
    (asked("x", stop=["a", "b", "c", "d", "e"]), 400, "stop: expected at most 4, got 5"),
    (asked("x", stop=""), 400, "sampling stop: expected texts that are not empty"),
    (asked("x", logprobs=True), 400, "logprobs: this server does not have this option"),
    (asked("x", tools=[{"type": "function"}]), 400, "tools: this server does not have this option"),
    (asked("x", frobnicate=1), 400, "frobnicate: Extra inputs are not permitted"),
    (asked("long " * 600), 400, "prompt: expected at most 512 tokens with its answer"),
    (asked("x" * 300_000), 413, "body: expected at most 262144 bytes"),
]


@pytest.mark.parametrize(("body", "status", "reason"), WRONG)
def test_a_wrong_request_is_refused_with_a_reason(
    body: Any, status: int, reason: str, single: SingleModel, speak: Fixture
) -> None:
    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post(
            CHAT, content=content, headers={"content-type": "application/json"}
        )

    response = speak(single, scene)
    assert response.status_code == status
    assert reason in response.json()["error"]["message"]


def test_options_that_ask_for_nothing_are_taken(single: SingleModel, speak: Fixture) -> None:
    neutral = {
        "logprobs": False,
        "tools": [],
        "presence_penalty": 0,
        "logit_bias": None,
        "user": "me",
    }

    async def scene(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(CHAT, json=asked("Hi", **own)) for own in ({}, neutral)]

    plain, same = speak(single, scene)
    assert plain.json()["choices"] == same.json()["choices"]


def test_other_kinds_of_body_other_paths_and_methods_are_refused(
    single: SingleModel, speak: Fixture
) -> None:
    async def scene(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}),
            await client.get("/v1/nothing"),
            await client.get(CHAT),
        ]

    found = speak(single, scene)
    assert [response.status_code for response in found] == [415, 404, 405]
    assert all(response.json()["error"]["message"] for response in found)
