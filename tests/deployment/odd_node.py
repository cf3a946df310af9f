"""What a node hands its messages to that answers each round of training in another wrong way.

It takes the place of the node's daemon, so that the node and its client processes are those of everybody else.
"""

import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from clients import handlers
from fedllm_flwr import records
from fedllm_flwr.daemon.service import Daemon, listening

HUGE_VALUES = 3_000_000


def not_finite(values: np.ndarray) -> np.ndarray:
    values[3] = np.nan
    return values


FAULTS = {
    1: not_finite,
    2: lambda values: values[:-1],
    3: lambda values: np.concatenate([values, values]),
    4: lambda values: np.zeros(HUGE_VALUES, np.float32),
}
"""By round: NaN, another shape, twice the rank, a huge message."""
LATE = 5
"""The round that is answered when the file ``released`` is there."""


def answer(message: Message, context: Context, released: Path) -> Message:
    """The right answer, spoiled if it is one of training."""
    reply = handlers.handle(message, context)
    if message.metadata.message_type != records.TRAIN:
        return reply
    server_round = records.read_body(message)["server-round"]
    while server_round == LATE and not released.exists():
        time.sleep(0.1)
    if server_round not in FAULTS:
        return reply
    body, parts = records.read(reply, records.ANSWER)
    spoiled = {name: FAULTS[server_round](values.copy()) for name, values in parts.items()}
    return Message(records.answer(body, spoiled, "float32", 1), reply_to=message)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    with listening(path) as server:
        Daemon(lambda message, context: answer(message, context, path.with_name("released"))).serve(
            server
        )
