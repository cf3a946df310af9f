from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError
from strategies.exchange import by_client, messages_for, stream, wave_name
from strategies.hosting import Hosting

Fixture = Callable[..., Any]


def echo(message: Message, context: Any = None) -> Message:
    """A node that answers for every client asked: its info is its id, its adapter is its id three times."""
    if message.metadata.message_type == records.DESCRIBE:
        place = {
            name: int(context.node_config[name]) for name in ("partition-id", "num-partitions")
        }
        return Message(records.answer(place, {}, "float32", 0), reply_to=message)
    asked = records.read_body(message)["partition-ids"]
    infos = [{"partition-id": p, "error": "broken" if p == 13 else ""} for p in asked]
    parts = {f"{p}/adapter": np.full(3, p, np.float32) for p in asked}
    return Message(records.answer({"clients": infos}, parts, "float32", 1), reply_to=message)


@pytest.fixture(scope="module")
def hosting_on(edge_grid: Fixture) -> Callable[[int], Hosting]:
    def make(nodes: int) -> Hosting:
        hosting = Hosting(edge_grid(nodes, client_app=echo), 1.0, print, lambda *_: None)
        hosting.refresh()
        return hosting

    return make


def asking(hosting: Hosting, clients: Iterable[int], wave: int = 4) -> list[Message]:
    content = records.instruction({}, {"adapter": np.ones(5, np.float32)}, "float32")
    return messages_for(hosting, lambda _: content, {"x": 1}, message_type="train", partition_ids=list(clients),
                        clients_per_wave=wave, server_round=2)  # fmt: skip


def asked_of(message: Message) -> list[int]:
    return records.read_body(message)["partition-ids"]


def collected(hosting: Hosting, messages: list[Message]) -> list[Any]:
    return list(by_client(messages, stream(hosting.grid, messages, 10.0, lambda *_: None)))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    clients=st.lists(st.integers(0, 200), min_size=1, max_size=40, unique=True).map(sorted),
    nodes=st.integers(1, 6),
    wave=st.integers(1, 12),
)
def test_every_client_is_asked_once_on_its_node_in_its_wave(
    clients: list[int], nodes: int, wave: int, hosting_on: Fixture
) -> None:
    hosting = hosting_on(nodes)
    messages = asking(hosting, clients, wave)
    assert type(messages) is list
    assert sorted(p for m in messages for p in asked_of(m)) == clients
    by_wave: dict[str, list[int]] = {}
    for message in messages:
        assert {hosting.node_of(p) for p in asked_of(message)} == {message.metadata.dst_node_id}
        by_wave.setdefault(message.metadata.group_id, []).extend(asked_of(message))
    assert list(by_wave) == sorted(by_wave), "group ids sort in the order of waves"
    waves = [sorted(asked) for asked in by_wave.values()]
    assert waves == [clients[i : i + wave] for i in range(0, len(clients), wave)]
    assert [c.partition_id for c in collected(hosting, messages)] == clients


def test_clients_whose_node_is_not_there_are_named_and_nothing_is_sent_for_them(
    edge_grid: Fixture,
) -> None:
    grid = edge_grid(3, client_app=echo)
    hosting = Hosting(grid, 0.1, print, lambda *_: None)
    hosting.refresh()
    grid.get_node_ids = lambda: [1000, 1002]
    hosting.refresh(range(9), 6)
    before = len(grid.sent)
    found = collected(hosting, asking(hosting, range(9)))
    missing = [c for c in found if c.error]
    assert [c.partition_id for c in missing] == [1, 4, 7]
    assert {c.error for c in missing} == {"its node is not there"}
    assert sorted(c.partition_id for c in found) == list(range(9))
    assert {m.metadata.dst_node_id for m in grid.sent[before:]} == {1000, 1002}


def test_messages_share_one_array(hosting_on: Fixture) -> None:
    messages = asking(hosting_on(4), range(20))
    assert len(messages) == 20
    assert len({id(m.content["arrays"]) for m in messages}) == 1
    assert {records.read_body(m)["x"] for m in messages} == {1}


def test_waves_sort_beyond_ten_and_rounds_before_waves() -> None:
    names = [wave_name("train", r, w) for r in (2, 10, 200) for w in (0, 9, 10, 1000)]
    assert names == sorted(names)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
@given(data=st.data(), nodes=st.integers(1, 5))
def test_replies_in_any_order_come_out_in_the_order_of_clients(
    data: st.DataObject, nodes: int, hosting_on: Fixture
) -> None:
    hosting = hosting_on(nodes)
    messages = asking(hosting, range(10), wave=4)
    replies = hosting.grid.send_and_receive(messages)
    shuffled = data.draw(st.permutations(replies))
    found = list(by_client(messages, shuffled))
    assert [c.partition_id for c in found] == list(range(10))
    for client in found:
        np.testing.assert_array_equal(client.parts["adapter"], np.full(3, client.partition_id))
        assert set(client.parts) == {"adapter"}


def test_one_wave_is_in_flight_at_a_time(hosting_on: Fixture) -> None:
    hosting = hosting_on(2)
    messages = asking(hosting, range(9), wave=3)
    grid = hosting.grid
    before = len(grid.sent)
    replies = by_client(messages, stream(grid, messages, 10.0, lambda *_: None))
    sent = [(client.partition_id, len(grid.sent) - before) for client in replies]
    # Two messages a wave; the next wave leaves when all clients of the one before have been handed out.
    assert sent == [(p, 2 * (p // 3 + 1)) for p in range(9)]


def test_every_message_is_counted_once_each_way(hosting_on: Fixture) -> None:
    hosting = hosting_on(2)
    messages = asking(hosting, range(8))
    counted: list[tuple[str, str]] = []
    list(stream(hosting.grid, messages, 10.0, lambda kind, way, m: counted.append((kind, way))))
    assert sorted(counted) == [("train", "downlink")] * 4 + [("train", "uplink")] * 4


def test_later_waves_are_not_sent_after_the_deadline(hosting_on: Fixture) -> None:
    hosting = hosting_on(2)
    messages = asking(hosting, range(8))
    before = len(hosting.grid.sent)
    found = list(by_client(messages, stream(hosting.grid, messages, 0.0, lambda *_: None)))
    assert len(hosting.grid.sent) == before
    assert [c.partition_id for c in found] == list(range(8))
    assert {c.error for c in found} == {"no reply before the deadline"}


def test_a_clients_own_error_is_its_own(hosting_on: Fixture) -> None:
    found = collected(hosting_on(1), asking(hosting_on(1), (12, 13, 14)))
    assert {c.partition_id: c.error for c in found} == {12: "", 13: "broken", 14: ""}


def test_an_error_reply_is_an_error_of_each_client_that_was_asked(hosting_on: Fixture) -> None:
    hosting = hosting_on(2)
    messages = asking(hosting, range(6), wave=6)
    replies = hosting.grid.send_and_receive(messages)
    replies[1] = Message(Error(5, "node\nis dead"), reply_to=messages[1])
    found = {c.partition_id: c.error for c in by_client(messages, replies)}
    assert found == {
        0: "",
        2: "",
        4: "",
        1: "error 5: is dead",
        3: "error 5: is dead",
        5: "error 5: is dead",
    }


def test_an_error_without_a_reason_is_an_error_all_the_same(hosting_on: Fixture) -> None:
    hosting = hosting_on(1)
    messages = asking(hosting, [0])
    hosting.grid.send_and_receive(messages)
    found = list(by_client(messages, [Message(Error(3), reply_to=messages[0])]))
    assert [(c.partition_id, c.error[:8]) for c in found] == [(0, "error 3:")]


def test_a_dead_worker_stops_the_run(hosting_on: Fixture) -> None:
    hosting = hosting_on(2)
    messages = asking(hosting, range(4))
    hosting.grid.send_and_receive(messages)
    with pytest.raises(RunStoppedError, match=r"worker died \(ActorDiedError\)"):
        list(by_client(messages, [Message(Error(0, "ActorDiedError"), reply_to=messages[0])]))


def test_an_answer_to_a_message_of_another_round_counts_for_nothing(hosting_on: Fixture) -> None:
    hosting = hosting_on(1)
    old, new = asking(hosting, [0, 1]), asking(hosting, [0, 1])
    replies = hosting.grid.send_and_receive(old)
    hosting.grid.send_and_receive(new)
    found = list(by_client(new, replies))
    assert [(c.partition_id, c.stray) for c in found] == [
        (0, True),
        (1, True),
        (0, False),
        (1, False),
    ]
    assert [c.error for c in found[2:]] == ["no reply before the deadline"] * 2
