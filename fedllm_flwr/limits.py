"""How large a message may be, judged before anything of it is decoded.

Flower has no limit of its own: it cuts arrays into pieces of 5 MiB and puts them together again.
"""

from collections.abc import Iterable, Mapping

from flwr.app import Array, Error, Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run  # private path of the type that the public Grid.run returns

from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.settings.runtime import MAX_MESSAGE_MB

MEGABYTE = 1e6
NODE_LIMIT = "max-message-mb"
"""The key of a node config that bounds instructions."""
ERROR_TOO_LARGE = 413
"""In the place of a reply that is too large; none of Flower's own codes."""


def content_bytes(message: Message) -> int:
    """Bytes of a message's arrays, texts and numbers, as they lie in memory; nothing is decoded or copied."""
    if not message.has_content():
        return 0
    total = 0
    for record in message.content.values():
        for name, value in record.items():
            values = value if isinstance(value, list) else [value]
            total += len(name) + sum(map(_value_bytes, values))
    return total


def _value_bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    return len(value) if isinstance(value, str | bytes) else 8


def check_size(message: Message, limit_mb: float, what: str, key: str) -> None:
    """Refuse a message that is too large.

    Args:
        message: What came.
        limit_mb: Largest content in MB (10⁶ bytes).
        what: What it is, for the message.
        key: The setting that holds the limit, for the message.

    Raises:
        WireError: It is larger.
    """
    found = content_bytes(message) / MEGABYTE
    if found > limit_mb:
        raise WireError(f"{what}: expected at most {limit_mb:g} MB ({key}), got {found:.4g} MB")


def limit_of_node(facts: Mapping[str, object]) -> float:
    """The largest instruction that a node takes, in MB; no message can change it.

    Raises:
        ConfigError: The node's fact is no positive number.
    """
    value = facts.get(NODE_LIMIT, MAX_MESSAGE_MB)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"node config {NODE_LIMIT}: expected a number above 0, got {value!r:.40}")
    return float(value)


class BoundedGrid(Grid):
    """A grid that hands out errors in the place of replies that are too large.

    Args:
        grid: Carries the messages.
        limit_mb: Largest content of a reply.
    """

    def __init__(self, grid: Grid, limit_mb: float) -> None:
        self._grid = grid
        self._limit_mb = limit_mb

    def set_run(self, run: object) -> None:
        """As the grid itself."""
        self._grid.set_run(run)  # type: ignore[arg-type]

    @property
    def run(self) -> Run:
        """As the grid itself."""
        return self._grid.run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Deprecated in Flower; construct ``Message`` instead.

        Raises:
            TypeError: Always.
        """
        raise TypeError("BoundedGrid.create_message: construct flwr.app.Message instead")

    def get_node_ids(self) -> Iterable[int]:
        """As the grid itself."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered, since its replies would be pulled without their messages.

        Raises:
            TypeError: Always.
        """
        raise TypeError("BoundedGrid.push_messages: use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered; see :meth:`push_messages`.

        Raises:
            TypeError: Always.
        """
        raise TypeError("BoundedGrid.pull_messages: use send_and_receive")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, wait, and judge the replies."""
        sent = list(messages)
        replies = self._grid.send_and_receive(sent, timeout=timeout)
        asked = {
            message.metadata.message_id: message for message in sent
        }  # ids are given when sending
        return [self._judged(reply, asked) for reply in replies]

    def _judged(self, reply: Message, asked: dict[str, Message]) -> Message:
        try:
            check_size(reply, self._limit_mb, "reply", "runtime.max_message_mb")
        except WireError as error:
            message = asked.get(reply.metadata.reply_to_message_id)
            if message is None:
                raise
            return Message(Error(ERROR_TOO_LARGE, str(error)), reply_to=message)
        return reply
