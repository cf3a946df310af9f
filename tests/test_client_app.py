import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

import clients
from fedllm_flwr import client_app, records
from fedllm_flwr.settings.methods import METHODS

Fixture = Callable[..., Any]


def test_the_app_is_what_pyproject_names() -> None:
    assert isinstance(client_app.app, ClientApp)


def test_every_method_has_a_client() -> None:
    assert set(clients.TRAIN) == set(clients.EVALUATE) == set(METHODS)


@pytest.mark.parametrize("place", [0, 2])
def test_a_node_says_which_place_it_takes(place: int, edge_grid: Fixture) -> None:
    grid = edge_grid(3)
    content = records.instruction({}, {}, "float32")
    (reply,) = grid.send_and_receive([Message(content, 1000 + place, records.DESCRIBE)])
    body, parts = records.read(reply, records.ANSWER)
    assert body == {"partition-id": place, "num-partitions": 3}
    assert parts == {}


def test_messages_reach_the_method_that_they_name(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    sent = play(micro("num_rounds=1"), splits=("test",)).grid.sent
    for message in sent:
        if message.metadata.message_type == records.DESCRIBE:
            continue
        (reply,) = edge_grid().send_and_receive([message])
        assert reply.has_content()
        body = json.loads(message.content["instruction"]["body"])
        body["config"]["method"]["name"] = "telepathy"
        message.content["instruction"]["body"] = json.dumps(body)
        (reply,) = edge_grid().send_and_receive([message])
        assert "telepathy" in reply.error.reason


@pytest.mark.parametrize("kind", ["query.secrets", "train.shell"])
def test_other_kinds_of_messages_are_refused(kind: str, edge_grid: Fixture) -> None:
    (reply,) = edge_grid(1).send_and_receive([Message(RecordDict(), 1000, kind)])
    assert reply.error.code == 2
    assert "function registered" in reply.error.reason


@pytest.mark.parametrize(
    ("facts", "got"),
    [
        ({"num-partitions": 2}, "partition-id=None num-partitions=2"),
        ({"partition-id": "first", "num-partitions": 2}, "partition-id='first' num-partitions=2"),
    ],
)
def test_a_node_without_a_place_says_what_it_lacks(
    facts: dict[str, Any], got: str, edge_grid: Fixture
) -> None:
    grid = edge_grid(1)
    grid.contexts[1000].node_config = facts
    content = records.instruction({}, {}, "float32")
    (reply,) = grid.send_and_receive([Message(content, 1000, records.DESCRIBE)])
    assert reply.error.reason.endswith(
        f"node config: expected whole numbers partition-id and num-partitions, got {got}"
    )


def test_a_client_process_imports_nothing_heavy_before_it_has_to() -> None:
    """Flower starts one for every message."""
    typed = "import sys, fedllm_flwr.client_app; print(*sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", typed], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
