"""An application on the tiny model, or on a model that can be held up, spoken to over ASGI."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Generator, Listener
from fedllm_flwr.serving.answering import Answerer, Ask, Reply, SingleModel
from fedllm_flwr.serving.app import create_app
from fedllm_flwr.serving.rendering import encode_chat
from fedllm_flwr.settings.serving import ServingConfig

SMALL: dict[str, Any] = {"max_wait_seconds": 0.01, "max_new_tokens": 64, "max_context_tokens": 512}


class Echo:
    """Says the prompt backwards, letter by letter; can be held up, and remembers its batches."""

    name = "echo"
    tiers = ("echo",)

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.cancelled: list[str] = []
        self.open = threading.Event()
        self.open.set()

    def check(self, ask: Ask) -> None:
        if ask.content == "bad":
            raise ConfigError("prompt: it is bad")

    def answer(self, asks: Sequence[Ask], listener: Listener) -> list[Reply]:
        texts = [str(ask.content) for ask in asks]
        self.batches.append(texts)
        assert self.open.wait(20)
        if "fail" in texts:
            raise RuntimeError("on purpose")
        for k, text in enumerate(texts):
            for size in range(1, len(text) + 1):
                if not listener(k, 0, text[::-1][:size]):
                    self.cancelled.append(text)
                    break
        return [
            Reply((text[::-1],), ("stop",), len(text), len(text), self.name, 0.75, 2.5)
            for text in texts
        ]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="session")
def generator() -> Generator:
    return Generator(load(ModelRef("tiny"), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def single(generator: Generator) -> SingleModel:
    return SingleModel("tiny-run", generator, encode_chat, max_context_tokens=512)


Scene = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture(scope="session")
def config() -> Callable[..., ServingConfig]:
    """Settings for tests, with what is to be different."""
    return lambda **changed: ServingConfig(**{**SMALL, **changed})


@pytest.fixture(scope="session")
def speak(config: Callable[..., ServingConfig]) -> Callable[..., Any]:
    """Play a scene with a client of an application over an answerer."""

    @asynccontextmanager
    async def client_of(
        answerer: Answerer, token: str, changed: dict[str, Any]
    ) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(answerer, config(**changed), token)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client,
        ):
            yield client

    def spoken(answerer: Answerer, scene: Scene, *, token: str = "", **changed: Any) -> Any:
        async def run() -> Any:
            async with client_of(answerer, token, changed) as client:
                return await asyncio.wait_for(scene(client), 60)

        return asyncio.run(run())

    return spoken
