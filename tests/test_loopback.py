from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedllm_flwr.loopback import ERROR_CLIENT_RAISED, LoopbackGrid

Fixture = Callable[..., Any]


def content() -> RecordDict:
    return RecordDict({"a": ArrayRecord({"x": Array(np.arange(4.0))}), "c": ConfigRecord({"n": 1})})


def answer(message: Message, context: Context) -> Message:
    counter = context.state.setdefault("count", ConfigRecord({"n": 0}))
    counter["n"] += 1
    message.content["c"]["n"] = 99
    message.content["c"]["place"] = context.node_config["partition-id"]
    message.content["c"]["seen"] = counter["n"]
    return Message(message.content, reply_to=message)


def ask(grid: LoopbackGrid, *nodes: int) -> list[Message]:
    return grid.send_and_receive(
        [Message(content(), node, "train", group_id="g") for node in nodes]
    )


def test_it_is_a_grid_of_flowers_with_the_nodes_asked_for() -> None:
    grid = LoopbackGrid(answer, 3, {"device": "cpu"})
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [1000, 1001, 1002]
    for place, context in enumerate(grid.contexts.values()):
        assert context.node_config == {"partition-id": place, "num-partitions": 3, "device": "cpu"}


def test_replies_belong_to_their_messages() -> None:
    grid = LoopbackGrid(answer, 3)
    messages = [Message(content(), node, "train", group_id="g") for node in (1002, 1000)]
    replies = grid.send_and_receive(messages)
    for message, reply in zip(messages, replies, strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert reply.metadata.src_node_id == message.metadata.dst_node_id
        assert reply.metadata.group_id == "g"
    assert [reply.content["c"]["place"] for reply in replies] == [2, 0]


def test_server_and_clients_share_no_memory() -> None:
    kept: list[Message] = []

    def keep(message: Message, context: Context) -> Message:
        kept.append(message)
        return Message(message.content, reply_to=message)

    grid = LoopbackGrid(keep, 1)
    mine = Message(content(), 1000, "train")
    (reply,) = grid.send_and_receive([mine])
    assert kept[0].content["a"] is not mine.content["a"]
    assert reply.content["a"] is not kept[0].content["a"]
    kept[0].content["c"]["n"] = 5
    assert mine.content["c"]["n"] == reply.content["c"]["n"] == 1


def test_a_node_keeps_its_state_for_the_run() -> None:
    grid = LoopbackGrid(answer, 2)
    seen = [ask(grid, 1000, 1001)[0].content["c"]["seen"] for _ in range(3)]
    assert seen == [1, 2, 3]
    assert grid.contexts[1001].state["count"]["n"] == 3


def test_a_client_that_raises_is_an_error_reply_and_the_others_go_on() -> None:
    def raises(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no such row")
        return answer(message, context)

    replies = ask(LoopbackGrid(raises, 3), 1000, 1001, 1002)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == ERROR_CLIENT_RAISED
    assert replies[1].error.reason == "ValueError: no such row"


def test_each_reply_is_handed_out_once() -> None:
    grid = LoopbackGrid(answer, 1)
    ids = grid.push_messages([Message(content(), 1000, "train")])
    assert len(grid.pull_messages(ids)) == 1
    assert grid.pull_messages(ids) == []


def test_what_only_flower_has_is_refused() -> None:
    grid = LoopbackGrid(answer, 1)
    grid.set_run(None)
    with pytest.raises(TypeError, match=r"construct flwr\.app\.Message instead"):
        grid.create_message()
    with pytest.raises(TypeError, match="belongs to no Flower run"):
        _ = grid.run
