"""One question to many clients: messages by node and wave, replies by client and in order.

A wave is a run of consecutive partition ids of the cohort. Waves bound what is in flight, so the server's memory does
not grow with the cohort, and their replies are handed out in the order of partition ids, so a float sum is the same
whatever node answered first.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError, WireError
from strategies.hosting import ABSENT, Hosting

ERROR_UNKNOWN = 0
"""Flower's code for a dead simulation actor: it stays in the pool and swallows every later message."""

COUNTED = "counted"
"""In place of a codec: the parts are values that count as they are."""

LARGEST = 2**53
"""Largest magnitude of a number in an answer: the largest count that a float64 counts exactly."""


@dataclass(frozen=True)
class ClientReply:
    """What one client answered; ``error`` is set, and the rest is empty, when it did not.

    ``stray`` marks an answer that nobody asked for: it is worth naming, and says nothing about the client. ``codec`` is
    what the parts came as; an answer that no message brought has values that count as they are.
    """

    partition_id: int
    info: Mapping[str, Any]
    parts: Mapping[str, np.ndarray]
    error: str = ""
    stray: bool = False
    codec: str = COUNTED


def checked_number(client: str, info: Mapping[str, Any], name: str, *, whole: bool) -> Any:
    """One number of an answer, checked before anything of the answer counts.

    Args:
        client: Who, for the message.
        info: The answer.
        name: The number's key.
        whole: Whether it must be an integer.

    Raises:
        WireError: The number is absent, not finite, or too large to be true.
    """
    value = info.get(name)
    kind = int if whole else int | float
    if not isinstance(value, kind) or isinstance(value, bool) or not abs(value) <= LARGEST:
        wanted = "a whole number" if whole else "a finite number"
        raise WireError(f"{client}: {name}: expected {wanted}, got {value!r:.60}")
    return value


def wave_name(kind: str, server_round: int, wave: int) -> str:
    """Flower's group id of a wave; sorts in the order of waves."""
    return f"{kind}-{server_round:06d}-{wave:06d}"


def messages_for(
    hosting: Hosting,
    content: Callable[[Sequence[int]], RecordDict],
    body: Mapping[str, Any],
    *,
    message_type: str,
    partition_ids: Sequence[int],
    clients_per_wave: int,
    server_round: int,
) -> list[Message]:
    """One message per wave and node, and one to nobody for the clients whose node is not there.

    Args:
        hosting: Which node hosts which client.
        content: The arrays for some clients; messages may share them.
        body: What every message says.
        message_type: Flower's.
        partition_ids: Who is asked.
        clients_per_wave: Clients in flight at a time.
        server_round: For the waves' names.

    Returns:
        A list, never a generator: Flower's HTTP grid iterates twice.
    """
    messages = []
    for start in range(0, len(partition_ids), clients_per_wave):
        wave = sorted(
            partition_ids[start : start + clients_per_wave], key=lambda p: (hosting.node_of(p), p)
        )
        for node_id, hosted in groupby(wave, key=hosting.node_of):
            clients = list(hosted)
            asked = {**body, "partition-ids": clients}
            group_id = wave_name(message_type, server_round, start // clients_per_wave)
            messages.append(
                Message(
                    records.with_body(content(clients), asked),
                    node_id,
                    message_type,
                    group_id=group_id,
                )
            )
    return messages


def stream(
    grid: Grid,
    messages: Sequence[Message],
    timeout_seconds: float,
    count: Callable[[str, str, Message], None],
) -> Iterator[Message]:
    """Send wave after wave and yield the replies, so that only one wave is in memory.

    Args:
        grid: Flower's transport.
        messages: From :func:`messages_for`.
        timeout_seconds: For all waves together; later waves are not sent once it has passed.
        count: The byte ledger.
    """
    deadline = time.monotonic() + timeout_seconds
    there = (m for m in messages if m.metadata.dst_node_id != ABSENT)
    for _, wave in groupby(there, key=lambda m: m.metadata.group_id):
        sent = list(wave)
        left = deadline - time.monotonic()
        if left <= 0:
            return
        for message in sent:
            count(message.metadata.message_type, "downlink", message)
        yield from _handed_out(list(grid.send_and_receive(sent, timeout=left)), count)


def _handed_out(
    replies: list[Message], count: Callable[[str, str, Message], None]
) -> Iterator[Message]:
    """Count and yield replies; none is kept here while the next wave trains."""
    while replies:
        if replies[0].has_content():
            count(replies[0].metadata.message_type, "uplink", replies[0])
        yield replies.pop(0)


def by_client(messages: Sequence[Message], replies: Iterable[Message]) -> Iterator[ClientReply]:
    """Split replies by client, wave by wave and in the order of partition ids; name the clients that did not answer.

    Args:
        messages: What was sent.
        replies: What came back. An iterator is consumed wave by wave; a list may be in any order.

    Raises:
        RunStoppedError: A simulation actor died. Flower never replaces it, so going on would lose most messages.
    """
    if isinstance(replies, list):
        replies = sorted(replies, key=lambda r: r.metadata.group_id)
    asked: dict[str, list[tuple[Message, list[int]]]] = {}
    absent: list[int] = []
    for message in messages:
        if message.metadata.dst_node_id == ABSENT:
            absent += _asked(message)
        else:
            asked.setdefault(message.metadata.group_id, []).append((message, _asked(message)))
    waiting = {p for wave in asked.values() for _, clients in wave for p in clients}
    for sent, answers in _waves(asked, replies):
        yield from _of_wave(sent, answers, waiting)
    for partition_id in sorted([*waiting, *absent]):
        reason = (
            "no reply before the deadline" if partition_id in waiting else "its node is not there"
        )
        yield ClientReply(partition_id, {}, {}, reason)


Asked = list[tuple[Message, list[int]]]
"""Messages, and the clients that each of them asks."""


def _waves(
    asked: Mapping[str, Asked], replies: Iterable[Message]
) -> Iterator[tuple[Asked, list[Message]]]:
    """What was sent and what came back, wave by wave, each as soon as all of its messages are answered.

    Looking for the first reply of another wave instead would hold two waves: the next one is sent to get it.
    """
    group, answers, missing = "", list[Message](), set[str]()
    for reply in replies:
        if answers and reply.metadata.group_id != group:  # some nodes did not answer
            yield asked.get(group, []), answers
            answers = []
        if not answers:
            group = reply.metadata.group_id
            missing = {m.metadata.message_id for m, _ in asked.get(group, [])}
        answers.append(reply)
        missing.discard(reply.metadata.reply_to_message_id)
        del reply
        if not missing:
            yield asked.get(group, []), answers
            answers = []
    if answers:
        yield asked.get(group, []), answers


def _of_wave(sent: Asked, answers: list[Message], waiting: set[int]) -> Iterator[ClientReply]:
    """The clients of one wave in order; a generator, so that nothing of the wave outlives it."""
    asked = {m.metadata.message_id: clients for m, clients in sent}  # an id is given when sending
    clients = [c for r in answers for c in _split(r, asked.get(r.metadata.reply_to_message_id, []))]
    answers.clear()
    for client in sorted(clients, key=lambda c: c.partition_id):
        if client.stray:
            yield client
        elif client.partition_id in waiting:
            waiting.remove(client.partition_id)
            yield client
        else:
            yield _stray(client.partition_id, "one answer", "another one")


def _asked(message: Message) -> list[int]:
    return records.read_body(message)["partition-ids"]


def _split(reply: Message, asked: Sequence[int]) -> list[ClientReply]:
    """The clients of one reply; a reply that is an error, or does not decode, is an error of each client asked."""
    if reply.has_error():
        if reply.error.code == ERROR_UNKNOWN:
            raise RunStoppedError(
                f"a simulation worker died ({reply.error.reason}); resume the run to go on"
            )
        reason = f"error {reply.error.code}: {(str(reply.error.reason).strip().splitlines() or [''])[-1]}"
        return [ClientReply(p, {}, {}, reason) for p in asked]
    try:
        body, parts = records.read(reply, records.ANSWER)
        codec = records.read_codec(reply, records.ANSWER)
        clients = [(int(info["partition-id"]), dict(info)) for info in body["clients"]]
    except (WireError, KeyError, TypeError, ValueError, OverflowError) as error:
        return [ClientReply(p, {}, {}, f"unreadable reply: {error}") for p in asked]
    own: dict[str, dict[str, np.ndarray]] = {str(p): {} for p, _ in clients}
    for name, values in parts.items():
        client, _, part = name.partition("/")
        own.get(client, {})[part] = values
    return [
        ClientReply(p, info, own[str(p)], str(info.get("error", "")), codec=codec)
        if p in asked
        else _stray(p, f"answers of clients {list(asked)}", "one of this client")
        for p, info in clients
    ]


def _stray(partition_id: int, expected: str, got: str) -> ClientReply:
    error = f"client {partition_id}: expected {expected} from the node, got {got}; it is ignored"
    return ClientReply(partition_id, {}, {}, error, stray=True)
