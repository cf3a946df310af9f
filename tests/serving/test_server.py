"""A real server on a real port."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedllm_flwr import core
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.serving.app import create_app
from fedllm_flwr.serving.server import AnnouncedServer, checked_token, is_loopback, serve_run
from fedllm_flwr.settings.serving import TOKEN_VARIABLE, ServingConfig

Fixture = Callable[..., Any]


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def running(echo: Any, config: Fixture) -> Iterator[str]:
    """The address of a server over the echo."""
    own = config(port=0, max_queue=2, max_batch=1)
    server = AnnouncedServer(create_app(echo, own), own)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield server.address
    echo.open.set()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def waiting(address: str) -> int:
    return int(httpx.get(f"{address}health").json()["waiting"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_client_frees_its_place(stream: bool, echo: Any, running: str) -> None:
    echo.open.clear()
    host, port = running.removeprefix("http://").rstrip("/").split(":")

    def send(prompt: str) -> socket.socket:
        body = json.dumps({"model": "echo", "prompt": prompt, "stream": stream}).encode()
        client = socket.create_connection((host, int(port)))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        return client

    first = send("first")
    until(lambda: echo.batches == [["first"]])
    others = [send("second"), send("third")]
    until(lambda: waiting(running) == 2)
    full = httpx.post(f"{running}v1/completions", json={"model": "echo", "prompt": "x"})
    assert full.status_code == 429
    others[0].close()
    until(lambda: waiting(running) == 1)
    first.close()  # its batch goes on, its rows are dropped
    late = send("late")
    until(lambda: waiting(running) == 2)
    time.sleep(0.1)
    echo.open.set()
    received = b""
    while b"etal" not in received if not stream else b"[DONE]" not in received:
        received += late.recv(4096)
    assert echo.batches == [["first"], ["third"], ["late"]]
    assert echo.cancelled == ["first"]
    for client in (others[1], late):
        client.close()


def test_the_official_client_works(running: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{running}v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["echo"]
        whole = client.completions.create(model="echo", prompt="abc")
        assert whole.choices[0].text == "cba"
        assert whole.usage.total_tokens == 6
        stream = client.completions.create(model="echo", prompt="abc", stream=True)
        assert "".join(part.choices[0].text for part in stream) == "cba"
        with pytest.raises(openai.BadRequestError, match="it is bad"):
            client.completions.create(model="echo", prompt="bad")
        with pytest.raises(openai.NotFoundError, match="expected 'echo'"):
            client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("here.example", False)],  # noqa: S104
)  # fmt: skip
def test_only_loopback_needs_no_token(
    host: str, loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_loopback(host) == loopback
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    config = ServingConfig(host=host)
    if loopback:
        assert checked_token(config) == ""
    else:
        with pytest.raises(ConfigError, match=f"expected a token in {TOKEN_VARIABLE}, got none"):
            checked_token(config)
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert checked_token(config) == "secret"


@pytest.fixture(scope="module")
def finished(micro: Fixture, edge_grid: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "run"
    core.run(edge_grid(), micro("num_rounds=1", "evaluate_every=1"), folder)
    return folder


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "fedllm_flwr", "action=serve", f"run={folder}", *options]


@pytest.mark.slow
def test_the_command_serves_a_run_and_ends_in_order(finished: Path) -> None:
    openai = pytest.importorskip("openai")
    environment = {**os.environ, TOKEN_VARIABLE: "secret"}
    process = subprocess.Popen(
        command(finished, "serving.port=0"), stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving at http://127.0.0.1:")
        address = line.split()[-1]
        with openai.OpenAI(base_url=f"{address}v1", api_key="secret", max_retries=0) as client:
            asked = {"model": "run", "messages": [{"role": "user", "content": "Hello"}]}
            options = {"max_tokens": 5, "temperature": 0}
            whole = client.chat.completions.create(**asked, **options)
            parts = client.chat.completions.create(**asked, **options, stream=True)
            text = "".join(part.choices[0].delta.content or "" for part in parts)
            assert whole.choices[0].message.content == text
        assert httpx.get(f"{address}v1/models").status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_said_in_one_line(finished: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serving.port={port}: cannot listen there"):
            serve_run(RunDirectory.open(finished), None, ServingConfig(port=port))


def test_settings_of_serving_are_read_by_its_action_only() -> None:
    found = compose_run(["experiment=smoke", "action=serve", "run=x", "serving.port=9"])
    assert found.serving == ServingConfig(port=9)
    with pytest.raises(ConfigError, match="with action=serve, got action=run"):
        compose_run(["experiment=smoke", "serving.port=9"])
