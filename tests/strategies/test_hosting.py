"""Nodes are faked at the transport's edge: which ids a grid lists, and what they answer to ``query.describe``."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Context, Error, Message

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.errors import RunStoppedError, WireError
from strategies.hosting import Hosting

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
    assert log.notes == ["a node did not say who it is: ClientApp stopped responding."] * 2


def test_two_nodes_that_claim_one_place_are_told(grid_of: Fixture, host: Fixture, log: Log) -> None:
    grid = grid_of([[1000, 1001, 1002]], 3, saying())
    grid.contexts[1002].node_config["partition-id"] = 0
    hosting = host(grid)
    hosting.refresh()
    assert hosting.node_of(0) == 1000
    assert log.notes == ["two nodes claim partition-id 0; the later one is left out"]


@pytest.mark.parametrize("place", [-1, 2])
def test_an_impossible_place_is_refused(place: int, edge_grid: Fixture, host: Fixture) -> None:
    grid = edge_grid(2, client_app=saying(partition_id=place))
    with pytest.raises(WireError, match=rf"expected partition-id in \[0, 2\), got {place}"):
        host(grid).refresh()


def test_nodes_must_agree_on_their_number(edge_grid: Fixture, host: Fixture) -> None:
    def disagrees(message: Message, context: Context) -> Message:
        place = int(context.node_config["partition-id"])
        return saying(num_partitions=2 + place)(message, context)

    with pytest.raises(WireError, match=r"expected one num-partitions, got \[2, 3\]"):
        host(edge_grid(2, client_app=disagrees)).refresh()


def test_a_node_of_another_version_is_refused_and_both_are_shown(
    edge_grid: Fixture, host: Fixture
) -> None:
    def old(message: Message, context: Context) -> Message:
        reply = app(message, context)
        reply.content[records.ANSWER]["package-version"] = "0.0.1"
        return reply

    with pytest.raises(WireError, match=r"this side runs \S+, the other side 0\.0\.1"):
        host(edge_grid(1, client_app=old)).refresh()
