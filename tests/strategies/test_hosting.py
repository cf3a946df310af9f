"""Nodes are faked at the transport's edge: which ids a grid lists, and what they answer to ``query.describe``."""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.errors import RunStoppedError
from strategies.hosting import ABSENT, Hosting

Fixture = Callable[..., Any]


class Log:
    """Keeps what a Hosting tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.counted: list[tuple[str, str]] = []

    def count(self, kind: str, direction: str, message: Message) -> None:
        self.counted.append((kind, direction))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def host(log: Log) -> Callable[..., Hosting]:
    return lambda grid, wait=0.3: Hosting(grid, wait, log.notes.append, log.count)


@pytest.fixture(scope="module")
def grid_of(edge_grid: Fixture) -> Callable[..., Any]:
    """A grid whose node list is a sequence of lists, the last of which stays, and whose nodes may answer anything."""

    class NodesGrid(edge_grid):  # type: ignore[misc, valid-type]
        def __init__(self, lists: Iterable[list[int]], places: int, answer: Any = app) -> None:
            super().__init__(places, client_app=answer)
            self.lists = list(lists)

        def get_node_ids(self) -> list[int]:
            return self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]

        @property
        def asked(self) -> list[int]:
            return [m.metadata.dst_node_id for m in self.sent]

    return NodesGrid


def saying(**place: int) -> Callable[[Message, Context], Message]:
    """A node that claims a place of its own choice."""

    def answer(message: Message, context: Context) -> Message:
        own = {"partition-id": context.node_config["partition-id"], "num-partitions": 2}
        body = own | {name.replace("_", "-"): value for name, value in place.items()}
        return Message(records.answer(body, {}, "float32", 0), reply_to=message)

    return answer


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_node_n_hosts_the_clients_p_with_p_mod_nodes_equal_n(
    nodes: int, edge_grid: Fixture, host: Fixture, log: Log
) -> None:
    hosting = host(edge_grid(nodes))
    hosting.refresh()
    assert hosting.num_nodes == nodes
    assert [hosting.node_of(p) for p in range(9)] == [1000 + p % nodes for p in range(9)]
    assert hosting.node_of(records.POOLED) == 1000
    assert log.counted == [("query", "downlink")] * nodes + [("query", "uplink")] * nodes
    assert log.notes == []


def test_nodes_are_asked_once_as_long_as_they_stay(edge_grid: Fixture, host: Fixture) -> None:
    grid = edge_grid(3)
    hosting = host(grid)
    for _ in range(4):
        hosting.refresh()
    assert len(grid.sent) == 3


def test_it_waits_for_nodes_that_come_late(grid_of: Fixture, host: Fixture) -> None:
    grid = grid_of([[], [1001], [1001, 1000]], 2)
    hosting = host(grid, 5.0)
    hosting.refresh()
    assert [hosting.node_of(p) for p in range(2)] == [1000, 1001]
    assert grid.asked == [1001, 1000, 1001]


def test_a_changed_set_of_nodes_is_asked_again(grid_of: Fixture, host: Fixture) -> None:
    grid = grid_of([[1000, 1001], [1000, 1001], [1000, 1002]], 3, saying())
    grid.contexts[1002].node_config["partition-id"] = 1
    hosting = host(grid)
    hosting.refresh()
    assert hosting.node_of(1) == 1001
    hosting.refresh()
    assert len(grid.asked) == 2
    hosting.refresh()
    assert hosting.node_of(1) == 1002, "the node that took the place of one that left"
    assert grid.asked == [1000, 1001, 1000, 1002]


def test_it_waits_when_all_nodes_have_left_at_once(grid_of: Fixture, host: Fixture) -> None:
    grid = grid_of([[1000, 1001], [], [], [1000, 1001]], 2)
    hosting = host(grid, 5.0)
    hosting.refresh()
    hosting.refresh()
    assert grid.lists == [[1000, 1001]], "it looked until they were back"
    gone = grid_of([[1000, 1001], []], 2)
    hosting = host(gone)
    hosting.refresh()
    with pytest.raises(RunStoppedError, match=r"0 of 2 places are taken, missing partition-id \[0, 1\]"):  # fmt: skip
        hosting.refresh()


def test_a_place_that_nobody_takes_ends_the_wait_with_its_name(
    grid_of: Fixture, host: Fixture
) -> None:
    expected = r"nodes: waited 0\.3 s; 2 of 4 places are taken, missing partition-id \[1, 3\]"
    with pytest.raises(RunStoppedError, match=expected):
        host(grid_of([[1000, 1002]], 4)).refresh()


def test_no_node_at_all_ends_the_wait(grid_of: Fixture, host: Fixture) -> None:
    expected = "0 of unknown places are taken, missing partition-id all"
    with pytest.raises(RunStoppedError, match=expected):
        host(grid_of([[]], 1)).refresh()


def test_a_node_that_answers_with_an_error_is_told_and_asked_again(
    edge_grid: Fixture, host: Fixture, log: Log
) -> None:
    failures = 2

    def fails_first(message: Message, context: Context) -> Message:
        nonlocal failures
        if context.node_config["partition-id"] == 1 and failures:
            failures -= 1
            return Message(Error(8, "ClientApp stopped responding."), reply_to=message)
        return app(message, context)

    hosting = host(edge_grid(2, client_app=fails_first), 5.0)
    hosting.refresh()
    assert hosting.num_nodes == 2
    said = "a node did not say who it is: ClientApp stopped responding."
    assert log.notes == [said] * 2
    failures = 10**9
    with pytest.raises(RunStoppedError, match=rf"missing partition-id \[1\]; {said}$"):
        host(edge_grid(2, client_app=fails_first)).refresh()


def test_two_nodes_that_claim_one_place_are_told(grid_of: Fixture, host: Fixture, log: Log) -> None:
    grid = grid_of([[1000, 1001, 1002]], 3, saying())
    grid.contexts[1002].node_config["partition-id"] = 0
    hosting = host(grid)
    hosting.refresh()
    assert hosting.node_of(0) == 1000
    assert log.notes == ["two nodes claim partition-id 0; the later one is left out"]


@pytest.mark.parametrize("place", [-1, 2])
def test_a_node_of_an_impossible_place_is_named_and_left_out(
    place: int, edge_grid: Fixture, host: Fixture, log: Log
) -> None:
    grid = edge_grid(2, client_app=saying(partition_id=place))
    said = rf"node 1000: expected partition-id in \[0, 2\), got {place}"
    with pytest.raises(RunStoppedError, match=rf"0 of unknown places are taken.*; {said}"):
        host(grid).refresh()
    assert len(log.notes) == 2
    assert re.fullmatch(rf"{said}; it is left out", log.notes[0])
    assert len(grid.sent) == 2, "not asked over and over"


def numbers(*totals: int) -> Callable[[Message, Context], Message]:
    """Nodes that disagree on how many they are."""

    def answer(message: Message, context: Context) -> Message:
        place = int(context.node_config["partition-id"])
        return saying(num_partitions=totals[place])(message, context)

    return answer


def test_of_nodes_that_disagree_on_their_number_most_are_right(
    grid_of: Fixture, host: Fixture, log: Log
) -> None:
    hosting = host(grid_of([[1000, 1001], [1000, 1001, 1002]], 3, numbers(2, 2, 3)))
    hosting.refresh()
    assert log.notes == []
    hosting.refresh()
    assert [hosting.node_of(p) for p in range(2)] == [1000, 1001]
    assert log.notes == ["node 1002: expected num-partitions 2, got 3; it is left out"]


def test_a_number_that_the_run_began_with_stays(grid_of: Fixture, host: Fixture, log: Log) -> None:
    hosting = host(grid_of([[1000], [1000, 1001, 1002]], 3, numbers(1, 3, 3)))
    hosting.refresh()
    hosting.refresh()
    assert [hosting.node_of(p) for p in range(4)] == [1000] * 4
    assert [note.split(";")[0] for note in log.notes] == [
        f"node {n}: expected num-partitions 1, got 3" for n in (1001, 1002)
    ]


def test_nodes_of_which_no_half_is_larger_have_no_place(edge_grid: Fixture, host: Fixture) -> None:
    with pytest.raises(
        RunStoppedError, match=r"; nodes: expected one num-partitions, got \[2, 3\]"
    ):
        host(edge_grid(2, client_app=numbers(2, 3))).refresh()


def test_a_node_of_another_version_is_left_out_and_both_are_shown(
    edge_grid: Fixture, host: Fixture
) -> None:
    def old(message: Message, context: Context) -> Message:
        reply = app(message, context)
        reply.content[records.ANSWER]["package-version"] = "0.0.1"
        return reply

    with pytest.raises(
        RunStoppedError, match=r"node 1000: .*this side runs \S+, the other side 0\.0\.1"
    ):
        host(edge_grid(1, client_app=old)).refresh()


def lacks(name: str) -> Callable[[Message], Message]:
    def spoiled(reply: Message) -> Message:
        body, _ = records.read(reply, records.ANSWER)
        body.pop(name)
        return Message(records.answer(body, {}, "float32", 0), metadata=reply.metadata)  # type: ignore[call-overload]

    return spoiled


def empty(reply: Message) -> Message:
    return Message(RecordDict(), metadata=reply.metadata)  # type: ignore[call-overload]


@pytest.mark.parametrize("spoiled", [lacks("partition-id"), lacks("num-partitions"), empty])
def test_a_malformed_answer_is_named_and_the_node_asked_again_when_its_place_is_missing(
    spoiled: Callable[[Message], Message], edge_grid: Fixture, host: Fixture, log: Log
) -> None:
    answers = 0

    def node(message: Message, context: Context) -> Message:
        nonlocal answers
        reply = app(message, context)
        answers += context.node_config["partition-id"] == 1
        return spoiled(reply) if context.node_config["partition-id"] == 1 and answers < 2 else reply

    hosting = host(edge_grid(2, client_app=node))
    hosting.refresh(range(4), 2)
    assert [hosting.node_of(p) for p in range(4)] == [1000, ABSENT, 1000, ABSENT]
    assert log.notes[0].startswith("node 1001: unreadable answer: ")
    assert "the run goes on without clients 1, 3; node 1001: unreadable" in log.notes[1]
    hosting.refresh(range(4), 2)
    assert hosting.node_of(1) == 1001
    assert log.notes[2:] == ["nodes: partition-id [1] is taken again"]


def test_it_goes_on_without_a_node_if_enough_clients_have_one(
    grid_of: Fixture, host: Fixture, log: Log
) -> None:
    hosting = host(grid_of([[1000, 1001, 1002]], 3))
    hosting.refresh()
    hosting.grid.lists = [[1001, 1002]]
    with pytest.raises(
        RunStoppedError, match=r"2 of 3 places are taken, missing partition-id \[0\]"
    ):
        hosting.refresh(range(6), 5)
    hosting.refresh(range(6), 4)
    assert log.notes == [
        "nodes: waited 0.3 s for partition-id [0]; the run goes on without clients 0, 3"
    ]
    assert [hosting.node_of(p) for p in range(3)] == [ABSENT, 1001, 1002]
    assert hosting.node_of(records.POOLED) == 1001
    began = time.monotonic()
    hosting.refresh(range(6), 4)
    assert time.monotonic() - began < 0.3, "it does not wait for the place again"
    hosting.grid.lists = [[1000, 1001, 1002]]
    hosting.refresh(range(6), 4)
    assert hosting.node_of(3) == 1000
    assert log.notes[1:] == ["nodes: partition-id [0] is taken again"]


def test_a_note_names_no_more_than_some_clients(grid_of: Fixture, host: Fixture, log: Log) -> None:
    hosting = host(grid_of([[1000]], 2, saying()))
    hosting.refresh(range(100), 50)
    assert log.notes[0].endswith("clients " + ", ".join(map(str, range(1, 41, 2))) + " and 30 more")
