"""What a client keeps between the exchanges of one round: its controller, the optimizer's state, and where it is.

It lives in the node's Flower context, which comes back with the node's next message, and is gone when the round is.
"""

from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from fedllm_flwr.errors import WireError

_MOMENT = "moment/"


@dataclass
class Session:
    """One client in the middle of one round.

    Attributes:
        partition_id: The client.
        run: The run's name, as the server gives it.
        server_round: The round.
        controller: Flat values, float32.
        moments: State of the optimizer.
        exchange: The number of the message that comes next.
        step: The step whose prompts are out.
        rows_done: Rows whose gradients have arrived.
        loss_sum: Of these rows, in nats, where the client knows losses.
        cpu_seconds: Spent in this round.
    """

    partition_id: int
    run: str
    server_round: int
    controller: np.ndarray
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    exchange: int = 1
    step: int = 0
    rows_done: int = 0
    loss_sum: float = 0.0
    cpu_seconds: float = 0.0

    def save(self, context: Context) -> None:
        """Put the session into a node's context, in the place of the client's earlier one."""
        arrays = {"controller": self.controller}
        arrays |= {_MOMENT + name: values for name, values in self.moments.items()}
        context.state[_arrays(self.partition_id)] = ArrayRecord(
            {name: Array(np.ascontiguousarray(values)) for name, values in arrays.items()}
        )
        context.state[_facts(self.partition_id)] = ConfigRecord(
            {
                "run": self.run,
                "server-round": self.server_round,
                "exchange": self.exchange,
                "step": self.step,
                "rows-done": self.rows_done,
                "loss-sum": self.loss_sum,
                "cpu-seconds": self.cpu_seconds,
            }
        )


def open_session(
    context: Context, partition_id: int, run: str, server_round: int, exchange: int
) -> Session:
    """The session that a message goes on with.

    Args:
        context: The node's.
        partition_id: The client.
        run: The message's.
        server_round: The message's.
        exchange: The message's number within the round.

    Raises:
        WireError: The client is not where the message takes it to be, say because its node was started anew.
    """
    facts = context.state.get(_facts(partition_id))
    asked = (run, server_round, exchange)
    held = None
    if isinstance(facts, ConfigRecord):
        held = (facts["run"], facts["server-round"], facts["exchange"])
    arrays = context.state.get(_arrays(partition_id))
    if held != asked or not isinstance(facts, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise WireError(
            f"client {partition_id}: expected to be asked for round, exchange {held and held[1:]}, got {asked[1:]}"
        )
    values = {name: array.numpy().copy() for name, array in arrays.items()}
    return Session(
        partition_id=partition_id,
        run=run,
        server_round=server_round,
        controller=values.pop("controller"),
        moments={name.removeprefix(_MOMENT): moment for name, moment in values.items()},
        exchange=exchange,
        step=int(facts["step"]),  # type: ignore[arg-type]
        rows_done=int(facts["rows-done"]),  # type: ignore[arg-type]
        loss_sum=float(facts["loss-sum"]),  # type: ignore[arg-type]
        cpu_seconds=float(facts["cpu-seconds"]),  # type: ignore[arg-type]
    )


def close_session(context: Context, partition_id: int) -> None:
    """Forget a client's session, if there is one."""
    for name in (_arrays(partition_id), _facts(partition_id)):
        if name in context.state:
            del context.state[name]


def _arrays(partition_id: int) -> str:
    return f"session/{partition_id}"


def _facts(partition_id: int) -> str:
    return f"session-of/{partition_id}"
