import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fedllm_flwr.models.generation import Generator, Query, Sampling
from fedllm_flwr.serving.answering import SingleModel
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
