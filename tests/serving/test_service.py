import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from fedllm_flwr.models.generation import Listener, Sampling
from fedllm_flwr.serving.answering import Ask, Reply
from fedllm_flwr.serving.protocol import ApiError
from fedllm_flwr.serving.service import Service

Fixture = Callable[..., Any]


def play(echo: Any, config: Any, scene: Callable[[Service], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        service = Service(echo, config)
        service.start()
        try:
            return await asyncio.wait_for(scene(service), 20)
        finally:
            echo.open.set()
            await service.close()

    return asyncio.run(run())


def asks(*texts: str) -> list[Ask]:
    return [Ask(text, Sampling()) for text in texts]


async def never() -> None:
    await asyncio.Event().wait()


def test_prompts_of_one_request_are_queued_all_or_none(echo: Any, config: Fixture) -> None:
    async def scene(service: Service) -> list[Any]:
        echo.open.clear()
        first = service.submit(asks("first"))
        while not echo.batches:
            await asyncio.sleep(0.005)
        with pytest.raises(ApiError) as full:
            service.submit(asks("a", "b", "c"))
        await asyncio.sleep(0)
        assert (full.value.status, service.waiting) == (429, 0)
        with pytest.raises(ApiError) as bad:
            service.submit(asks("a", "bad"))
        assert (bad.value.status, service.waiting) == (400, 0)
        second = service.submit(asks("a", "b"))
        echo.open.set()
        return [*await service.replies(first, never()), *await service.replies(second, never())]

    found = play(echo, config(max_queue=2), scene)
    assert [reply.texts[0] for reply in found] == ["tsrif", "a", "b"]


def test_a_client_that_goes_away_is_not_waited_for(echo: Any, config: Fixture) -> None:
    async def scene(service: Service) -> None:
        echo.open.clear()
        gone = asyncio.Event()
        ticket = service.submit(asks("abc"))
        waiting = asyncio.create_task(service.replies(ticket, gone.wait()))
        while not echo.batches:
            await asyncio.sleep(0.005)
        gone.set()
        with pytest.raises(ApiError) as error:
            await waiting
        assert error.value.status == 499

    play(echo, config(), scene)
    assert echo.cancelled == ["abc"]


def test_a_stream_that_is_left_frees_its_place(echo: Any, config: Fixture) -> None:
    async def scene(service: Service) -> None:
        echo.open.clear()
        service.submit(asks("first"))
        while not echo.batches:
            await asyncio.sleep(0.005)
        parts = service.stream(service.submit(asks("abc"), stream=True))
        reading = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0.01)
        assert service.waiting == 1
        reading.cancel()
        await asyncio.wait({reading})
        assert service.waiting == 0

    play(echo, config(max_batch=1), scene)
    assert echo.batches == [["first"]]


def test_a_stream_that_drips_is_over_at_its_deadline(echo: Any, config: Fixture) -> None:
    def drip(asks: Sequence[Ask], listener: Listener) -> list[Reply]:
        for size in range(60):
            time.sleep(0.05)
            if not listener(0, 0, "a" * size):
                echo.cancelled.append("abc")
                break
        return [Reply(("a" * 60,), ("stop",), 1, 1, "echo", None, 0.0)]

    echo.answer = drip

    async def scene(service: Service) -> list[Any]:
        heard: list[Any] = []

        async def read() -> None:
            async for part in service.stream(service.submit(asks("abc"), stream=True)):
                heard.append(part)

        with pytest.raises(ApiError) as error:
            await read()
        assert error.value.status == 504
        return heard

    heard = play(echo, config(timeout_seconds=0.4), scene)
    assert all(isinstance(part, tuple) for part in heard)
    assert echo.cancelled == ["abc"]


def test_a_server_that_stops_answers_what_it_has_and_takes_no_more(
    echo: Any, config: Fixture
) -> None:
    async def run() -> str:
        service = Service(echo, config(max_wait_seconds=30.0))
        service.start()
        ticket = service.submit(asks("abc"))
        replies = asyncio.create_task(service.replies(ticket, never()))
        await asyncio.sleep(0)
        await service.close()
        with pytest.raises(ApiError) as error:
            service.submit(asks("x"))
        assert error.value.status == 503
        return (await replies)[0].texts[0]

    assert asyncio.run(run()) == "cba"
