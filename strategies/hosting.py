"""Which node hosts which client.

A client is a party with data, named by its partition id; a node is a Flower SuperNode. With N nodes, node n hosts the
clients p with p mod N = n. Nodes say who they are in one ``query`` at the start, and again when the set of nodes
changes. The aggregate does not depend on hosting.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError, WireError

POLL_SECONDS = 0.25
QUERY_TIMEOUT_SECONDS = 120.0
ABSENT = 0
"""In the place of the id of a node that is not there; Flower gives it to no node."""
SHOWN = 20
"""Of clients in a note."""


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
        self._refused: dict[int, str] = {}
        self._errors: set[str] = set()
        self._given_up: set[int] = set()
        self._num_partitions = 0
        self._is_settled = False

    def refresh(self, wanted: Sequence[int] = (), at_least: int = 0) -> None:
        """Learn the nodes again if their set has changed; wait, with a deadline, until all places are taken.

        A node whose answer is of no use is named and left out, and asked again the next time that its place is missing.
        After the deadline the run goes on without the places that are missing if enough of the wanted clients have a
        node; it does not wait for these places again, and takes them back as soon as a node has them.

        Args:
            wanted: The clients that are about to be asked; none: all places must be taken.
            at_least: How many of them must have a node.

        Raises:
            RunStoppedError: The deadline passed and too few clients have a node.
        """
        deadline = time.monotonic() + self._wait_seconds
        if self._missing() and self._refused:
            self._seen = set()  # whoever was of no use may be by now
        while True:
            present = set(self.grid.get_node_ids())
            if not present:
                self._seen = set()
            elif present != self._seen:
                self._ask(present)
            self._nodes = {place: n for place, n in self._nodes.items() if n in present}
            missing = self._missing()
            found = sum(self.node_of(client) != ABSENT for client in wanted)
            is_enough = bool(wanted) and found >= at_least
            if self._nodes and (not missing or (is_enough and missing <= self._given_up)):
                self._settle(missing, wanted)
                return
            if time.monotonic() > deadline:
                if not (self._nodes and is_enough):
                    raise RunStoppedError(self._why(missing))
                self._settle(missing, wanted)
                return
            time.sleep(POLL_SECONDS)

    def node_of(self, partition_id: int) -> int:
        """The node id that hosts a client, or ``ABSENT``; the first node that is there hosts the pooled rows."""
        if not self._nodes:
            return ABSENT
        if partition_id == records.POOLED:
            return self._nodes[min(self._nodes)]
        return self._nodes.get(partition_id % self._num_partitions, ABSENT)

    @property
    def num_nodes(self) -> int:
        """How many nodes host clients."""
        return len(self._nodes)

    def _missing(self) -> set[int]:
        return set(range(self._num_partitions)) - self._nodes.keys()

    def _settle(self, missing: set[int], wanted: Sequence[int]) -> None:
        """Go on with the nodes that are there, and say what has changed about those that are not."""
        if missing - self._given_up:
            lost = sorted({p for p in wanted if self.node_of(p) == ABSENT})
            more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
            clients = ", ".join(map(str, lost[:SHOWN])) + more
            self._note(
                f"nodes: waited {self._wait_seconds:g} s for partition-id {sorted(missing)}; the run goes on without "
                f"clients {clients}{self._complaints()}"
            )
        if back := self._given_up - missing:
            self._note(f"nodes: partition-id {sorted(back)} is taken again")
        self._given_up = missing
        self._is_settled = True

    def _why(self, missing: set[int]) -> str:
        return (
            f"nodes: waited {self._wait_seconds:g} s; {len(self._nodes)} of "
            f"{self._num_partitions or 'unknown'} places are taken, missing partition-id {sorted(missing) or 'all'}"
            f"{self._complaints()}"
        )

    def _complaints(self) -> str:
        """What was wrong with the nodes that are left out."""
        return "".join(f"; {reason}" for reason in sorted({*self._refused.values(), *self._errors}))

    def _ask(self, present: Iterable[int]) -> None:
        """Ask the nodes for their places; those that fail to answer are asked again soon."""
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
        said: dict[int, tuple[int, int]] = {}
        answered = set[int]()
        before, self._refused = self._refused, {}
        self._errors = set()
        for reply in self.grid.send_and_receive(messages, timeout=QUERY_TIMEOUT_SECONDS):
            self._count("query", "uplink", reply)
            if reply.has_error():
                self._errors.add(f"a node did not say who it is: {reply.error.reason}")
                self._note(f"a node did not say who it is: {reply.error.reason}")
                continue
            node_id = reply.metadata.src_node_id
            answered.add(node_id)
            try:
                said[node_id] = _place_of(reply)
            except WireError as error:
                self._refused[node_id] = str(error)
        self._agree(said)
        self._seen = answered
        self._nodes = {}
        for node_id, (place, _) in said.items():
            if place in self._nodes:
                self._note(f"two nodes claim partition-id {place}; the later one is left out")
            else:
                self._nodes[place] = node_id
        for reason in dict.fromkeys(self._refused.values()):
            if reason not in before.values():
                self._note(f"{reason}; it is left out")

    def _agree(self, said: dict[int, tuple[int, int]]) -> None:
        """Settle on one number of places: the run's, or what most say; nodes that say another are taken out.

        If no number has more nodes than every other one, none of them has a place.
        """
        totals = Counter(total for _, total in said.values()).most_common()
        if not totals:
            return
        if not self._is_settled:
            if len(totals) > 1 and totals[0][1] == totals[1][1]:
                numbers = sorted(total for total, _ in totals)
                reason = f"nodes: expected one num-partitions, got {numbers}"
                self._refused |= dict.fromkeys(said, reason)
                self._num_partitions = 0
                said.clear()
                return
            self._num_partitions = totals[0][0]
        for node_id in [n for n, (_, total) in said.items() if total != self._num_partitions]:
            _, total = said.pop(node_id)
            self._refused[node_id] = (
                f"node {node_id}: expected num-partitions {self._num_partitions}, got {total}"
            )


def _place_of(reply: Message) -> tuple[int, int]:
    """The place that a node takes, and of how many.

    Raises:
        WireError: It cannot be read, is of another version of this package, or is no place.
    """
    node = f"node {reply.metadata.src_node_id}"
    try:
        body, _ = records.read(reply, records.ANSWER)
        place, total = int(body["partition-id"]), int(body["num-partitions"])
    except (WireError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"{node}: unreadable answer: {error}") from error
    if not 0 <= place < total:
        raise WireError(f"{node}: expected partition-id in [0, {total}), got {place}")
    return place, total
