"""An in-process Grid: real messages and a real ClientApp, no network and no Ray.

For tests, small studies and debugging. Each message and reply is serialised into Flower's own objects and copied,
so that server and clients share no memory, as over a network.
"""

import uuid
from collections.abc import Callable, Iterable
from copy import deepcopy

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run  # private path of the type that the public Grid.run returns
from flwr.supercore.task_identity import (
    TaskIdentity,
)  # private: a Message needs the identity of its run

ERROR_CLIENT_RAISED = 2
"""Flower's error code for a ClientApp that raised."""


class LoopbackGrid(Grid):
    """Carries messages between a strategy and a ClientApp in one process, one message at a time.

    Args:
        client_app: The ClientApp, or anything callable like one.
        num_nodes: How many nodes to offer.
        node_config: Node-local facts that every node has beside its own ``partition-id`` and ``num-partitions``.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        num_nodes: int,
        node_config: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._client_app = client_app
        self._replies: dict[str, Message] = {}
        self.contexts = {
            1000 + n: Context(
                run_id=1,
                node_id=1000 + n,
                node_config={"partition-id": n, "num-partitions": num_nodes, **(node_config or {})},
                state=RecordDict(),
                run_config={},
            )
            for n in range(num_nodes)
        }

    def set_run(self, run: object) -> None:
        """Loopback has one run; there is nothing to set."""

    @property
    def run(self) -> Run:
        """Loopback has no run information.

        Raises:
            TypeError: Always.
        """
        raise TypeError("LoopbackGrid.run: an in-process grid belongs to no Flower run")

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Deprecated in Flower; construct ``Message`` instead.

        Raises:
            TypeError: Always.
        """
        raise TypeError("LoopbackGrid.create_message: construct flwr.app.Message instead")

    def get_node_ids(self) -> list[int]:
        """The node ids."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver each message at once and keep its reply."""
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._deliver(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand out the replies to these messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Deliver messages and return their replies (``timeout`` has no meaning within one process)."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message:
        incoming = deepcopy(message)
        try:
            return deepcopy(self._client_app(incoming, self.contexts[message.metadata.dst_node_id]))
        except Exception as error:
            return Message(
                Error(ERROR_CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=incoming
            )
