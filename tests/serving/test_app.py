import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from fedllm_flwr.models.generation import Generator, Query, Sampling
from fedllm_flwr.serving.answering import SingleModel
from fedllm_flwr.serving.app import create_app
from fedllm_flwr.serving.rendering import Turn, encode_chat

Fixture = Callable[..., Any]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


def asked(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "tiny-run", "messages": [{"role": "user", "content": text}], "max_tokens": 8,
            "temperature": 0, **options}  # fmt: skip


def alone(generator: Generator, text: str, count: int = 8) -> str:
    """The greedy answer to a chat of one turn, computed by itself."""
    ids = encode_chat([Turn("user", text)], generator.backbone.tokenizer)
    [answer] = generator.generate([Query(tuple(ids), Sampling(count))])
    return answer.samples[0].text


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_64_clients_each_get_the_answer_to_their_own_request(
    single: SingleModel, generator: Generator, speak: Fixture
) -> None:
    texts = [f"Client {k} asks about number {k * k}" for k in range(64)]

    async def scene(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*[
            client.post(CHAT, json=asked(text, stream=bool(k % 2))) for k, text in enumerate(texts)
        ])  # fmt: skip

    responses = speak(single, scene)
    wanted = [alone(generator, text) for text in texts]
    assert len(set(wanted)) > 32
    for k, response in enumerate(responses):
        assert response.status_code == 200
        if k % 2:
            *parts, done = events_of(response)
            assert done == "data: [DONE]"
            found = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        else:
            found = response.json()["choices"][0]["message"]["content"]
        assert found == wanted[k]


def test_a_response_has_openais_form_and_says_who_answered_at_what_cost(
    single: SingleModel, speak: Fixture
) -> None:
    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(CHAT, json=asked("Hello", n=2, temperature=1.0, seed=5))

    response = speak(single, scene)
    body = response.json()
    assert (body["object"], body["model"]) == ("chat.completion", "tiny-run")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert {choice["message"]["role"] for choice in body["choices"]} == {"assistant"}
    used = body["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert response.headers["x-fedllm-tier"] == "tiny-run"
    assert float(response.headers["x-fedllm-cost"]) == used["total_tokens"]
    assert "x-fedllm-agreement" not in response.headers
    again = speak(single, scene).json()
    assert again["choices"] == body["choices"]
    assert again["id"] != body["id"]


def test_agreement_and_cost_are_those_of_the_answerer(echo: Any, speak: Fixture) -> None:
    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(PLAIN, json={"model": "echo", "prompt": ["abc", "de"]})

    response = speak(echo, scene)
    assert [choice["text"] for choice in response.json()["choices"]] == ["cba", "ed"]
    assert response.headers["x-fedllm-agreement"] == "0.75,0.75"
    assert response.headers["x-fedllm-cost"] == "5"
    assert response.headers["x-fedllm-tier"] == "echo"


def test_a_stream_gives_the_text_as_it_grows_and_the_tokens_at_the_end(
    echo: Any, speak: Fixture
) -> None:
    body = {
        "model": "echo",
        "prompt": "abc",
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(PLAIN, json=body)

    response = speak(echo, scene)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-fedllm-tier"] == "echo"
    *texts, end, tokens, done = events_of(response)
    assert [part["choices"][0]["text"] for part in texts] == ["c", "b", "a"]
    assert end["choices"][0]["finish_reason"] == "stop"
    assert tokens["choices"] == []
    assert tokens["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert done == "data: [DONE]"


def test_a_full_queue_is_429_and_loses_nobody(echo: Any, speak: Fixture) -> None:
    async def scene(client: httpx.AsyncClient) -> list[httpx.Response]:
        echo.open.clear()
        first = asyncio.create_task(client.post(PLAIN, json={"model": "echo", "prompt": "first"}))
        while not echo.batches:
            await asyncio.sleep(0.005)
        many = [
            asyncio.create_task(client.post(PLAIN, json={"model": "echo", "prompt": f"{k}th"}))
            for k in range(12)
        ]
        _done, _ = await asyncio.wait(many, timeout=5, return_when="FIRST_COMPLETED")
        while sum(task.done() for task in many) < 7:
            await asyncio.sleep(0.005)
        health = (await client.get("/health")).json()
        assert (health["status"], health["waiting"]) == ("ok", 5)
        echo.open.set()
        return [await first, *[await task for task in many]]

    first, *rest = speak(echo, scene, max_queue=5, max_batch=3)
    assert first.json()["choices"][0]["text"] == "tsrif"
    assert sorted(response.status_code for response in rest) == [200] * 5 + [429] * 7
    for k, response in enumerate(rest):
        if response.status_code == 200:
            assert response.json()["choices"][0]["text"] == f"{k}th"[::-1]
        else:
            assert response.json()["error"]["code"] == "queue_full"
            assert response.headers["retry-after"] == "1"


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


@pytest.mark.parametrize("stream", [False, True])
def test_any_name_of_a_tier_fits_into_a_header(stream: bool, echo: Any, speak: Fixture) -> None:
    echo.name = "ход: 5 %"
    echo.tiers = (echo.name,)

    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        body = {"model": echo.name, "prompt": "abc", "stream": stream}
        return await client.post(PLAIN, json=body)

    response = speak(echo, scene)
    assert response.status_code == 200
    assert response.headers["x-fedllm-tier"] == "%D1%85%D0%BE%D0%B4: 5 %25"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_504_and_is_given_up(
    stream: bool, echo: Any, speak: Fixture
) -> None:
    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        echo.open.clear()
        response = await client.post(
            PLAIN, json={"model": "echo", "prompt": "slow", "stream": stream}
        )
        echo.open.set()
        return response

    response = speak(echo, scene, timeout_seconds=0.2)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert echo.cancelled == ["slow"]


def test_a_model_that_fails_is_500_and_the_server_goes_on(echo: Any, speak: Fixture) -> None:
    async def scene(client: httpx.AsyncClient) -> list[httpx.Response]:
        failed = await client.post(PLAIN, json={"model": "echo", "prompt": "fail"})
        return [failed, await client.post(PLAIN, json={"model": "echo", "prompt": "on"})]

    failed, fine = speak(echo, scene)
    assert failed.status_code == 500
    assert "on purpose" not in failed.text
    assert fine.json()["choices"][0]["text"] == "no"


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


def test_a_token_is_asked_for_where_there_is_one(single: SingleModel, speak: Fixture) -> None:
    right = {"Authorization": "Bearer secret"}

    async def scene(client: httpx.AsyncClient) -> list[int]:
        calls: list[tuple[str, dict[str, str]]] = [
            ("/v1/models", {}), ("/v1/models", {"Authorization": "Bearer wrong"}), ("/metrics", {}),
            ("/v1/models", right), ("/metrics", right), ("/health", {}), ("/", {}),
        ]  # fmt: skip
        return [(await client.get(path, headers=headers)).status_code for path, headers in calls]

    assert speak(single, scene, token="secret") == [401, 401, 401, 200, 200, 200, 200]


def test_models_and_metrics_tell_what_there_is_and_was(echo: Any, speak: Fixture) -> None:
    async def scene(client: httpx.AsyncClient) -> tuple[Any, str]:
        await client.post(PLAIN, json={"model": "echo", "prompt": ["abc", "de"]})
        await client.post(PLAIN, json={"model": "other", "prompt": "x"})
        return (await client.get("/v1/models")).json(), (await client.get("/metrics")).text

    models, metrics = speak(echo, scene)
    assert [entry["id"] for entry in models["data"]] == ["echo"]
    for line in (
        'fedllm_responses_total{path="/v1/completions",status="200"} 1.0',
        'fedllm_responses_total{path="/v1/completions",status="404"} 1.0',
        'fedllm_tokens_total{direction="input",tier="echo"} 5.0',
        'fedllm_cost_total{tier="echo"} 5.0',
        "fedllm_batch_requests_sum 2.0",
        "fedllm_queue_requests 0.0",
        "fedllm_answer_seconds_count 2.0",
    ):
        assert line in metrics.splitlines()


def test_the_page_loads_nothing_from_elsewhere(single: SingleModel, speak: Fixture) -> None:
    async def scene(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    response = speak(single, scene)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "://" not in response.text
    assert "src=" not in response.text
    assert "v1/chat/completions" in response.text
