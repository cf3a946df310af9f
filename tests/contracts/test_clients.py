"""What every client promises: it is deterministic, leaves the backbone alone, and answers only for whom it hosts."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from clients.workspace import open_workspace
from fedllm_flwr import __version__, records
from fedllm_flwr.core import whole_json

Fixture = Callable[..., Any]


@pytest.fixture(scope="module")
def asked(configured: Fixture, play: Fixture) -> Callable[[str], list[Message]]:
    """The training and evaluation messages of the second round of a case, as the server sent them."""
    found: dict[str, list[Message]] = {}

    def messages(case: str) -> list[Message]:
        if case not in found:
            config = configured(case, "num_rounds=2", "evaluate_every=2")
            sent = play(config, splits=("validation", "test")).grid.sent
            bodies = [(m, json.loads(m.content["instruction"]["body"])) for m in sent]
            found[case] = [m for m, body in bodies if body.get("server-round") == 2]
        return found[case]

    return messages


def content(reply: Message) -> tuple[dict[str, Any], bytes]:
    """Body without its CPU time, and the bytes of the array."""
    assert reply.has_content(), reply.error
    body = json.loads(reply.content["answer"]["body"])
    for client in body["clients"]:
        client.pop("cpu-seconds", None)
    arrays = reply.content.array_records.get("arrays")
    return body, arrays["flat"].data if arrays is not None else b""


def state(case_config: Any) -> str:
    """Hash of every value of the shared backbone that a workspace holds."""
    model = open_workspace(whole_json(case_config)).backbone.model
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def test_clients_are_deterministic_and_leave_the_backbone_bit_equal(
    case: str, configured: Fixture, asked: Fixture, edge_grid: Fixture
) -> None:
    config = configured(case, "num_rounds=2", "evaluate_every=2")
    before = state(config)
    grid = edge_grid()
    first = [content(r) for r in grid.send_and_receive(asked(case))]
    assert state(config) == before
    # a client that has trained evaluates with its own prompt, so there the order of messages matters
    order = 1 if case == "prompt_personal" else -1
    again = [content(r) for r in edge_grid().send_and_receive(asked(case)[::order])]
    assert again[::order] == first
    assert {len(body["clients"]) for body, _ in first} == {2}
    trained = [data for _, data in first if data]
    assert len(trained) == 2
    assert trained[0] != trained[1]


def test_a_message_that_comes_twice_is_answered_alike_and_only_personal_prompts_are_kept(
    case: str, asked: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid()
    train = [m for m in asked(case) if m.metadata.message_type == records.TRAIN]
    again = [content(r) for _ in range(2) for r in grid.send_and_receive(train)]
    assert again[: len(train)] == again[len(train) :]
    kept = sorted(name.partition("/")[0] for c in grid.contexts.values() for name in c.state)
    assert kept == (["personal"] * 4 + ["personal-of"] * 4 if case == "prompt_personal" else [])


def error_of(grid: Any, message: Message) -> str:
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert reply.error.code == 2
    return str(reply.error.reason)


def changed(message: Message, **body: Any) -> Message:
    record = dict(message.content["instruction"])
    record["body"] = json.dumps(json.loads(record["body"]) | body)
    twin = records.with_body(message.content, {})
    twin["instruction"] = ConfigRecord(record)
    meta = message.metadata
    return Message(twin, meta.dst_node_id, meta.message_type, group_id=meta.group_id)


@pytest.mark.parametrize("kind", [records.TRAIN, records.EVALUATE])
def test_a_node_refuses_clients_that_it_does_not_host(
    kind: str, asked: Fixture, edge_grid: Fixture
) -> None:
    message = next(m for m in asked("factor_mean") if m.metadata.message_type == kind)
    reason = error_of(edge_grid(), changed(message, **{"partition-ids": [0, 3]}))
    assert "partition-id 0 of 2: asked for client 3, which it does not host" in reason


@pytest.mark.parametrize("kind", [records.TRAIN, records.EVALUATE])
def test_a_client_that_does_not_exist_is_an_error(
    kind: str, asked: Fixture, edge_grid: Fixture
) -> None:
    message = next(m for m in asked("factor_mean") if m.metadata.message_type == kind)
    for nobody in (4, -2):
        reason = error_of(edge_grid(), changed(message, **{"partition-ids": [nobody]}))
        assert f"client {nobody}" in reason


def test_another_version_is_an_error_that_shows_both(asked: Fixture, edge_grid: Fixture) -> None:
    message = changed(asked("factor_mean")[0])
    message.content["instruction"]["package-version"] = "9.9.9"
    reason = error_of(edge_grid(), message)
    assert f"this side runs {__version__}, the other side 9.9.9" in reason


def test_another_fingerprint_is_an_error_that_shows_both(
    asked: Fixture, edge_grid: Fixture
) -> None:
    message = asked("factor_mean")[0]
    body = json.loads(message.content["instruction"]["body"])
    reason = error_of(edge_grid(), changed(message, fingerprint="0123456789abcdef"))
    assert body["fingerprint"] in reason
    assert "0123456789abcdef" in reason


def test_a_configuration_that_is_not_valid_here_is_an_error(
    asked: Fixture, edge_grid: Fixture
) -> None:
    message = asked("factor_mean")[0]
    config = json.loads(message.content["instruction"]["body"])["config"]
    config["method"]["target"] = "q_proj"
    assert "method: unknown key 'target'" in error_of(edge_grid(), changed(message, config=config))


def test_a_node_uses_its_own_device_and_not_the_servers(asked: Fixture, edge_grid: Fixture) -> None:
    grid = edge_grid(node_config={"device": "cuda:7"})
    assert "device 'cuda:7' is not present" in error_of(grid, changed(asked("factor_mean")[0]))


def test_a_client_that_fails_does_not_spoil_its_neighbours(micro: Fixture, play: Fixture) -> None:
    own = "method.client_alphas=[8,1e300]"  # the scaling of clients 1 and 3 overflows float32
    played = play(micro(own, "num_rounds=1", "runtime.num_nodes=1"))
    assert [c["partition_id"] for c in played.run.records("client")] == [0, 2]
    failures = played.run.records("failure")
    assert [f["partition_id"] for f in failures] == [1, 3]
    assert failures[0]["reason"] == "client 1: loss is nan at step 1"
    assert len([m for m in played.grid.replies if m.metadata.message_type == records.TRAIN]) == 1


def test_adapters_of_clients_differ_and_start_from_the_servers(
    asked: Fixture, edge_grid: Fixture
) -> None:
    train = [m for m in asked("factor_mean") if m.metadata.message_type == records.TRAIN]
    grid = edge_grid()
    _, sent = records.read(train[0], records.INSTRUCTION)
    found = []
    for reply in grid.send_and_receive(train):
        _, parts = records.read(reply, records.ANSWER)
        found += list(parts.values())
    assert len(found) == 4
    for flat in found:
        distance = np.abs(flat - sent["adapter"]).max()
        assert 0 < distance < 0.2, "two AdamW steps of 0.02 each"
