"""A cascade's first tier at the clients: what every message to it says, and how its answers are read.

The base of two strategies that train nothing. They use Flower's evaluation hooks, so Flower's own loop drives them too.
"""

import json
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import RunStoppedError, WireError
from strategies.exchange import ClientReply, messages_for
from strategies.fedunlearning import staying
from strategies.hosting import Hosting


class Account(Protocol):
    """Who is told what crosses the wire, and which client is left out."""

    def count(self, kind: str, direction: str, message: Message) -> None:
        """A message crosses the wire."""

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """A client's answer is missing or was dropped."""


class ClientTier(Strategy):
    """Asks clients about, or for, a tier's answers.

    Args:
        config: Task, partition and runtime; its method is not read.
        hosting: Which node hosts which client.
        account: Who is told.
        tier: Settings and arrays of the first tier, from :func:`fedllm_flwr.tiers.pack_tier`.
    """

    def __init__(
        self,
        config: RunConfig,
        hosting: Hosting,
        account: Account,
        tier: tuple[Mapping[str, Any], Mapping[str, np.ndarray]],
    ) -> None:
        self.config = config
        self.hosting = hosting
        self.account = account
        self.settings, self.parts = tier
        self.clients = staying(config, range(config.partition.num_clients))
        self.run = uuid.uuid4().hex
        self._sent: list[Message] = []

    def summary(self) -> None:
        """Flower's hook for a start-up log line; the run directory says it all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nothing is trained."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Nothing is trained."""
        return None, None

    @abstractmethod
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages of one exchange."""

    def _messages(
        self,
        kind: str,
        server_round: int,
        partition_ids: Sequence[int],
        body: Mapping[str, Any],
        *,
        with_tier: bool = True,
    ) -> list[Message]:
        """Messages to some clients; the tier is encoded once for all of them."""
        content = records.instruction({}, self.parts if with_tier else {}, "float32")

        def shared(_: Sequence[int]) -> RecordDict:
            return content

        common = {
            "config": json.loads(self.config.to_json()),
            "fingerprint": self.config.fingerprint(),
            "server-round": server_round,
            "run": self.run,
            **({"cascade": self.settings} if with_tier else {}),
        }
        return messages_for(
            self.hosting,
            shared,
            {**common, **body},
            message_type=kind,
            partition_ids=partition_ids,
            clients_per_wave=self.config.runtime.clients_per_wave,
            server_round=server_round,
        )

    def _enough(self, good: int, asked: int, what: str) -> None:
        """Refuse to go on with too few clients.

        Raises:
            RunStoppedError: Fewer than ``strategy.min_fraction`` of them gave a good answer.
        """
        if good == 0 or good < self.config.strategy.min_fraction * asked:
            raise RunStoppedError(
                f"{what}: {good} of {asked} clients gave a good answer; strategy.min_fraction="
                f"{self.config.strategy.min_fraction:g} asks for more"
            )


def whole_numbers(reply: ClientReply, name: str, length: int) -> np.ndarray:
    """A list of counts of an answer, int64 [length].

    Raises:
        WireError: The client failed, or it is something else.
    """
    if reply.error:
        raise WireError(reply.error)
    values = reply.info.get(name)
    good = isinstance(values, list) and len(values) == length
    if not good or not all(type(v) is int and 0 <= v < 2**53 for v in values):  # type: ignore[union-attr]
        raise WireError(
            f"client {reply.partition_id}: {name}: expected {length} counts, got {values!r:.60}"
        )
    return np.array(values, dtype=np.int64)
