"""Which node hosts which client.

A client is a party with data, named by its partition id; a node is a Flower SuperNode. With N nodes, node n hosts the
clients p with p mod N = n. Nodes say who they are in one ``query`` at the start, and again when the set of nodes
changes. The aggregate does not depend on hosting.
"""

import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError, WireError

POLL_SECONDS = 0.25
QUERY_TIMEOUT_SECONDS = 120.0


class Hosting:
    """Finds the nodes, and answers which of them hosts a client.

    Args:
        grid: Flower's transport.
        wait_seconds: How long to wait until enough nodes have joined to host every client.
        note: Called with one line when something is worth telling.
        count: Called with ``(kind, direction, message)`` for every message that crosses the wire.
    """

    def __init__(
        self,
        grid: Grid,
        wait_seconds: float,
        note: Callable[[str], None],
        count: Callable[[str, str, Message], None],
    ) -> None:
        self.grid = grid
        self._wait_seconds = wait_seconds
        self._note = note
        self._count = count
        self._nodes: dict[int, int] = {}
        self._seen: set[int] = set()
        self._num_partitions = 0

    def refresh(self) -> None:
        """Learn the nodes again if their set has changed; wait, with a deadline, until all places are taken.

        Raises:
            RunStoppedError: The deadline passed and some clients have no node.
            WireError: A node runs another version of this package, or names an impossible place.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            present = set(self.grid.get_node_ids())
            if present and present != self._seen:
                self._ask(present)
            taken = {place for place, node_id in self._nodes.items() if node_id in present}
            if self._num_partitions and len(taken) == self._num_partitions:
                return
            if time.monotonic() > deadline:
                missing = sorted(set(range(self._num_partitions)) - taken)
                raise RunStoppedError(
                    f"nodes: waited {self._wait_seconds:g} s; {len(taken)} of "
                    f"{self._num_partitions or 'unknown'} places are taken, missing partition-id {missing or 'all'}"
                )
            time.sleep(POLL_SECONDS)

    def node_of(self, partition_id: int) -> int:
        """The node id that hosts a client; the pooled rows are hosted by the first node."""
        place = 0 if partition_id == records.POOLED else partition_id % self._num_partitions
        return self._nodes[place]

    @property
    def num_nodes(self) -> int:
        """How many nodes host clients."""
        return len(self._nodes)

    def _ask(self, present: Iterable[int]) -> None:
        messages = [
            Message(
                records.instruction({}, {}, "float32"),
                node_id,
                records.DESCRIBE,
                group_id="describe",
            )
            for node_id in sorted(present)
        ]
        for message in messages:
            self._count("query", "downlink", message)
        nodes: dict[int, int] = {}
        totals = set()
        answered = set()
        for reply in self.grid.send_and_receive(messages, timeout=QUERY_TIMEOUT_SECONDS):
            self._count("query", "uplink", reply)
            if reply.has_error():
                self._note(f"a node did not say who it is: {reply.error.reason}")
                continue
            body, _ = records.read(reply, records.ANSWER)
            place, total = int(body["partition-id"]), int(body["num-partitions"])
            if not 0 <= place < total:
                raise WireError(
                    f"node {reply.metadata.src_node_id}: expected partition-id in [0, {total}), got {place}"
                )
            if place in nodes:
                self._note(f"two nodes claim partition-id {place}; the later one is left out")
            else:
                nodes[place] = reply.metadata.src_node_id
            totals.add(total)
            answered.add(reply.metadata.src_node_id)
        if len(totals) > 1:
            raise WireError(f"nodes: expected one num-partitions, got {sorted(totals)}")
        if totals:
            self._num_partitions = totals.pop()
        self._nodes, self._seen = nodes, answered
