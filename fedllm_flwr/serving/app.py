"""The HTTP server's routes."""

import asyncio
import secrets
import string
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedllm_flwr.serving.answering import Answerer, Reply
from fedllm_flwr.serving.page import PAGE, SECURITY_POLICY
from fedllm_flwr.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Kind,
    asks_of,
    parse,
)
from fedllm_flwr.serving.service import Part, Service, client_gone
from fedllm_flwr.serving.shapes import Envelope, events
from fedllm_flwr.settings.serving import ServingConfig

OPEN_PATHS = ("/", "/health")
"""What needs no token."""


def create_app(answerer: Answerer, config: ServingConfig, token: str = "") -> FastAPI:
    """An application over an answerer; its lifespan starts and ends the queue.

    Args:
        answerer: Who answers.
        config: Sizes and limits.
        token: What requests must carry; empty = nothing.
    """
    service = Service(answerer, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    # no pages of documentation: they load scripts from elsewhere
    app = FastAPI(
        title="fedllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_middleware(Guard, service=service, token=token)
    app.exception_handler(ApiError)(_refused)
    app.exception_handler(HTTPException)(_unknown)
    app.exception_handler(Exception)(_failed)
    _add_routes(app, service, config)
    return app


def _add_routes(app: FastAPI, service: Service, config: ServingConfig) -> None:
    name = service.answerer.name

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": SECURITY_POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": service.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "fedllm"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete(request, ChatRequest, service, config)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _complete(request, CompletionRequest, service, config)


async def _complete(
    request: Request, kind: type[Kind], service: Service, config: ServingConfig
) -> Response:
    wanted = parse(await _body(request, config), kind)
    if wanted.model != service.answerer.name:
        raise ApiError(
            404,
            f"model: expected {service.answerer.name!r}, got {wanted.model!r}",
            "model_not_found",
        )
    ticket = service.submit(asks_of(wanted, config), stream=bool(wanted.stream))  # type: ignore[arg-type]
    envelope = Envelope(wanted)
    if not wanted.stream:
        replies = await service.replies(ticket, _gone(request))
        return JSONResponse(envelope.whole(replies), headers=_headers(replies))
    parts = service.stream(ticket)
    first = await _while_there(request, anext(parts))  # an error so far has a status of its own
    tiers = service.answerer.tiers
    headers = {"Cache-Control": "no-store"} | (
        {"x-fedllm-tier": _in_header(tiers[0])} if len(tiers) == 1 else {}
    )
    return StreamingResponse(
        events(envelope, _with_first(first, parts)), media_type="text/event-stream", headers=headers
    )


async def _body(request: Request, config: ServingConfig) -> bytes:
    """The whole body, if it is JSON and not too long.

    Raises:
        ApiError: 408, 413 or 415; 499 the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other kinds could be sent by any web page
        raise ApiError(415, f"content-type: expected application/json, got {kind!r}", "bad_type")
    too_long = ApiError(413, f"body: expected at most {config.max_body_bytes} bytes", "too_long")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and float(announced) > config.max_body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(config.timeout_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > config.max_body_bytes:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, "body: it did not come in time", "timeout") from None
    except ClientDisconnect:
        raise client_gone() from None
    return bytes(body)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _while_there(request: Request, wanted: Awaitable[Part]) -> Part:
    """What is waited for, unless the client goes away first.

    Raises:
        ApiError: 499.
    """
    coming, leaving = asyncio.ensure_future(wanted), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({coming, leaving}, return_when="FIRST_COMPLETED")
        if coming.done():
            return coming.result()
        raise client_gone()
    finally:
        coming.cancel()
        leaving.cancel()


async def _with_first(first: Part, parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
    yield first
    async for part in parts:
        yield part


def _headers(replies: list[Reply]) -> dict[str, str]:
    """Who answered, how far its members agreed, and what it cost; of several prompts the sum and the lists."""
    found = {
        "x-fedllm-tier": ",".join(dict.fromkeys(_in_header(reply.tier) for reply in replies)),
        "x-fedllm-cost": f"{sum(reply.cost for reply in replies):g}",
    }
    agreements = [reply.agreement for reply in replies if reply.agreement is not None]
    if agreements:
        found["x-fedllm-agreement"] = ",".join(f"{value:.4g}" for value in agreements)
    return found


def _in_header(name: str) -> str:
    """A name as headers can carry it: what is not printable ASCII in per cent, as in an address."""
    return quote(name, safe=string.punctuation.replace("%", " "))


class Guard:
    """Asks for the token and counts responses, around the whole application.

    Args:
        app: The application.
        service: Whose metrics count.
        token: What requests must carry; empty = nothing.
    """

    def __init__(self, app: ASGIApp, service: Service, token: str) -> None:
        self._app, self._service = app, service
        self._wanted = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._service.metrics.responded(path, message["status"])
            await send(message)

        if self._allows(scope):
            await self._app(scope, receive, counted)
            return
        error = ApiError(401, "authorization: expected Bearer and this server's token", "no_token")
        await _refused(Request(scope), error)(scope, receive, counted)

    def _allows(self, scope: Scope) -> bool:
        if not self._wanted or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._wanted)


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)  # noqa: S101  # registered for it
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


def _unknown(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: a path or a method that is not there."""
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for it
    own = ApiError(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}", "http"
    )
    return JSONResponse(own.body(), own.status, error.headers)


def _failed(request: Request, error: Exception) -> JSONResponse:
    own = ApiError(500, "the server failed; its log says why", "failed")
    return JSONResponse(own.body(), 500)
