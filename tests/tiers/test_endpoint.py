import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.tasks.base import Task, Template
from fedllm_flwr.tiers.endpoint import Endpoint, turns
from fedllm_flwr.tiers.members import Asking, Reply


class Server(ThreadingHTTPServer):
    """A server that answers what it is told to, and keeps what it was asked."""

    status = 200
    answer: Any = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        content = self.server.answer
        payload = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    served.answer = said("It is about Music.")
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def said(text: Any, read: Any = 20, written: Any = 5) -> dict[str, Any]:
    usage = {"prompt_tokens": read, "completion_tokens": written}
    return {"choices": [{"message": {"content": text}}], "usage": usage}


def test_an_answer_is_parsed_and_counted_as_the_server_counts(task: Task, server: Server) -> None:
    rows = task.splits["test"][:2]
    asking = Asking(samples=2, temperature=0.5, max_new_tokens=9, seed=3)
    replies = Endpoint("far", server.url, "big").ask(task, rows, asking)
    assert replies == [(Reply("music", 20, 5), Reply("music", 20, 5))] * 2
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body["messages"] == [{"role": "user", "content": f"{rows[0].text}\nTopic:"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.5, 9)
    assert len({asked[2]["seed"] for asked in server.asked}) == 4


@pytest.mark.parametrize("text", ["", None, "music or food", "no idea"])
def test_what_cannot_be_parsed_is_no_answer(task: Task, server: Server, text: Any) -> None:
    server.answer = said(text)
    [(reply,)] = Endpoint("far", server.url, "big").ask(task, task.splits["test"][:1], Asking())
    assert reply == Reply(None, 20, 5)


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    task: Task, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = Endpoint("far", server.url, "big", key_variable="FAR_KEY")
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"endpoint far: expected a key in .* FAR_KEY, got none"):
        far.ask(task, task.splits["test"][:1], Asking())
    assert server.asked == []
    monkeypatch.setenv("FAR_KEY", "very-secret")
    far.ask(task, task.splits["test"][:1], Asking())
    assert server.asked[0][1]["Authorization"] == "Bearer very-secret"
    server.status, server.answer = 401, {"error": "who are you"}
    with pytest.raises(RunStoppedError, match=r"status 401: .*who are you") as stopped:
        far.ask(task, task.splits["test"][:1], Asking())
    assert "very-secret" not in str(stopped.value)


@pytest.mark.parametrize("key", ["sk-1\n", "sk-1\r\nX: y", "sk-é", " sk-1"])
def test_a_key_that_no_header_can_hold_is_not_quoted(
    task: Task, server: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = Endpoint("far", server.url, "big", key_variable="FAR_KEY")
    monkeypatch.setenv("FAR_KEY", key)
    with pytest.raises(ConfigError, match="FAR_KEY, got other characters") as caught:
        far.ask(task, task.splits["test"][:1], Asking())
    assert "sk-" not in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        "no json",
        {},
        {"choices": []},
        [],
        said("music", read=None),
        said("music", written=-1),
        said(["music"]),
    ],
)
def test_what_is_no_answer_stops(task: Task, server: Server, answer: Any) -> None:
    server.answer = answer
    with pytest.raises(RunStoppedError, match="endpoint far: expected"):
        Endpoint("far", server.url, "big").ask(task, task.splits["test"][:1], Asking())


def test_a_server_that_is_not_there_stops(task: Task, server: Server) -> None:
    gone = Endpoint("far", "http://127.0.0.1:9/v1", "big")
    with pytest.raises(RunStoppedError, match="endpoint far: expected an answer, got ConnectError"):
        gone.ask(task, task.splits["test"][:1], Asking())


def test_a_system_text_is_a_turn_of_its_own() -> None:
    asked = turns(Template("t", "What is {text}?", chat=True, system="Be brief."), "this")
    assert asked == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is this?"},
    ]
