"""A server that puts what it likes into its messages: no file outside of the node's own folders is touched."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.errors import FedLLMError, WireError
from fedllm_flwr.tiers import Computing, unpack_tier

Fixture = Callable[..., Any]
FILE_EVENTS = (
    "open",
    "os.mkdir",
    "os.listdir",
    "os.scandir",
    "os.rename",
    "os.remove",
    "socket.connect",
    "import",
)
SEEN: list[str] = []
WATCHED: list[str] = []


def _watch(event: str, given: tuple[Any, ...]) -> None:
    if WATCHED and event in FILE_EVENTS and any(word in str(given) for word in WATCHED):
        SEEN.append(f"{event} {given}")


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    """Python's own audit; a hook cannot be taken away again, so it does nothing while nothing is watched."""
    sys.addaudithook(_watch)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What is done to files and addresses whose name holds the word ``forbidden``."""
    SEEN.clear()
    WATCHED[:] = ["forbidden"]
    yield SEEN
    WATCHED.clear()


def test_the_watch_sees_what_it_looks_for(watched: list[str], tmp_path: Path) -> None:
    (tmp_path / "forbidden").mkdir()
    (tmp_path / "forbidden" / "a").write_text("b")
    assert {line.split()[0] for line in watched} == {"os.mkdir", "open"}


def node(folder: Path) -> Context:
    facts: dict[str, Any] = {"partition-id": 0, "num-partitions": 1, "state-path": str(folder)}
    return Context(run_id=1, node_id=1000, node_config=facts, state=RecordDict(), run_config={})


@pytest.mark.parametrize(
    "name",
    [
        "../forbidden",
        "/tmp/forbidden",
        "a/../../forbidden",
        "..",
        ".",
        "a/b",
        "forbidden\0",
        "forbidden\n",
        "~",
        "a" * 65,
    ],
)
def test_the_name_of_a_run_is_no_path(
    name: str, micro: Fixture, play: Fixture, tmp_path: Path, watched: list[str]
) -> None:
    config = micro("method=fedprompt", "method.personal_length=1", "num_rounds=1", "runtime.num_nodes=1")  # fmt: skip
    grid = play(config).grid
    (message,) = (m for m in grid.sent if m.metadata.message_type == records.TRAIN)
    record = message.content[records.INSTRUCTION]
    state = tmp_path / "deep" / "state"

    def answered(run: str) -> dict[str, Any]:
        record["body"] = json.dumps({**json.loads(record["body"]), "run": run})
        body, _ = records.read(app(message, node(state)), records.ANSWER)
        return body["clients"][0]

    try:
        said = answered(name).get("error", "")
    except WireError as error:
        said = str(error)
    assert "expected letters, digits and dashes" in said
    assert watched == []
    assert list(tmp_path.iterdir()) == []
    assert not answered("a-plain_name").get("error")
    assert [path.name for path in state.iterdir()] == ["a-plain_name"]


PLAIN = {"template": "", "max_tokens": 32, "fixed_ids": [], "kind": "plain"}


@pytest.mark.parametrize(
    "member",
    [
        {"run": "/tmp/forbidden"},
        {"run": "../forbidden", "model": ""},
        {"model": "../forbidden"},
        {"model": "path", "path": "/tmp/forbidden"},
        {"model": "hub", "hub_id": "../forbidden"},
        {"model": "hub", "hub_id": "/tmp/forbidden"},
        {"model": "tiny", "base_url": "http://forbidden.invalid", "key_variable": "HOME"},
        {"model": "tiny", "_target_": "forbidden.system"},
    ],
)
def test_a_tier_in_a_message_names_no_file_address_or_code(
    member: dict[str, str], watched: list[str]
) -> None:
    body = {"tier": {"name": "t", "members": [member]}, "members": [PLAIN], "seed": 0}
    try:
        tier = unpack_tier(body, {}, "/models/own", Computing("float32", "cpu"))
    except FedLLMError:
        assert watched == []
        return
    (found,) = tier.members
    assert (found.ref.name, found.ref.path) in (("path", "/models/own"), ("tiny", ""))  # type: ignore[union-attr]
    assert watched == []


@pytest.mark.parametrize("group", ["method", "strategy", "model", "task", "client", "wire"])
def test_a_configuration_in_a_message_imports_nothing(
    group: str, micro: Fixture, play: Fixture, tmp_path: Path, watched: list[str]
) -> None:
    grid = play(micro("num_rounds=1", "runtime.num_nodes=1")).grid
    (message,) = (m for m in grid.sent if m.metadata.message_type == records.TRAIN)
    record = message.content[records.INSTRUCTION]
    body = json.loads(record["body"])
    for key, value in (("_target_", "forbidden.module"), ("name", "forbidden.module:run")):
        changed = json.loads(json.dumps(body))
        changed["config"][group][key] = value
        record["body"] = json.dumps(changed)
        with pytest.raises((FedLLMError, KeyError)):
            app(message, node(tmp_path))
    assert watched == []


def test_a_query_for_a_place_reads_nothing_of_the_message(tmp_path: Path) -> None:
    content = RecordDict()
    message = Message(content, 1000, records.DESCRIBE)
    body, parts = records.read(app(message, node(tmp_path)), records.ANSWER)
    assert (body, parts) == ({"partition-id": 0, "num-partitions": 1}, {})
