"""What a method has to say to be federated: what a round sends, how a reply counts, what is checkpointed.

:class:`strategies.rounds.RoundStrategy` asks these questions in the order of a round.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedllm_flwr import records
from fedllm_flwr.averaging.weights import client_weight
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.training.settings import scheduled_rate
from strategies.balance import Balance
from strategies.exchange import ClientReply
from strategies.hosting import Hosting
from strategies.observer import Checkpointed, Observer


def no_parts(partition_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Clients that are served what everybody is."""
    return {}


class FederatedMethod(Strategy):
    """The part of a strategy that belongs to its method.

    Args:
        config: The run.
        hosting: Which node hosts which client.
        observer: Who is told.
        partition_ids: The clients; by default all of the configuration's.
        task_kind: ``classification`` or ``instruction``: which figures an evaluation has.
    """

    def __init__(
        self,
        config: RunConfig,
        hosting: Hosting,
        observer: Observer,
        *,
        partition_ids: Sequence[int] | None = None,
        task_kind: str = "classification",
    ) -> None:
        self.config = config
        self.hosting = hosting
        self.observer = observer
        self.task_kind = task_kind
        self.partition_ids = (
            list(range(config.partition.num_clients))
            if partition_ids is None
            else list(partition_ids)
        )
        self.balance = Balance(config.fairness)
        self.set_up()

    @abstractmethod
    def set_up(self) -> None:
        """Build what belongs to the method from ``self.config``; called once, before anything else is asked."""

    @abstractmethod
    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Body and arrays of a round's training or evaluation messages."""

    @abstractmethod
    def begin_sum(self, server_round: int) -> None:
        """Start a new sum."""

    def start_values(self, server_round: int) -> dict[str, np.ndarray]:
        """What the values of replies are counted from, by part, float32 [n]; where all clients have the same.

        Raises:
            ConfigError: Replies of this method are not one set of values, which the configuration's checks say first.
        """
        raise self._without_values()

    def reply_values(self, reply: ClientReply, server_round: int) -> dict[str, np.ndarray]:
        """The values that a reply counts as, by part.

        Raises:
            WireError, ShapeError: Names, codec or sizes are not what was asked for, or a value is not finite.
            ConfigError: As of :meth:`start_values`.
        """
        raise self._without_values()

    def _without_values(self) -> ConfigError:
        return ConfigError(
            f"method={self.config.method.name}: its replies are not one set of values that could be clipped, kept or "
            "taken out alone"
        )

    @abstractmethod
    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Validate one client's reply and add it to the sum; returns the client's record.

        Raises:
            WireError, ShapeError: The reply is not valid; nothing has been added.
        """

    def weight_of(self, reply: ClientReply, num_examples: int) -> float:
        """What a client counts in the mean: its examples (or 1), times what its groups' rows weigh together.

        Raises:
            WireError: The number of examples is not above 0, or the sums of groups are none.
        """
        weight = client_weight(
            self.config.strategy.weighting, num_examples, client=reply.partition_id
        )
        return weight * self.balance.factor(self.balance.checked(reply))

    def learning_rate(self, server_round: int) -> float:
        """The clients' learning rate of a round, after warm-up and schedule."""
        client = self.config.client
        return scheduled_rate(
            self.config.optimizer.learning_rate,
            client.schedule,
            server_round=server_round,
            num_rounds=self.config.num_rounds,
            warmup_rounds=client.warmup_rounds,
            minimum_fraction=client.minimum_fraction,
        )

    @abstractmethod
    def finish_sum(self, server_round: int) -> None:
        """Turn the sum into the next global model."""

    def parts_for(
        self, partition_ids: Sequence[int], parts: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Of a broadcast's arrays, those that these clients need; by default all."""
        return parts

    def contents(
        self,
        parts: dict[str, np.ndarray],
        own_parts: Callable[[Sequence[int]], dict[str, np.ndarray]] = no_parts,
    ) -> Callable[[Sequence[int]], RecordDict]:
        """Arrays for the clients of a message; encoded once where all messages have the same.

        Args:
            parts: Of the broadcast.
            own_parts: What some clients are served beside it.
        """
        whole = records.instruction({}, parts, self.config.wire.downlink)

        def chosen(partition_ids: Sequence[int]) -> RecordDict:
            needed, own = self.parts_for(partition_ids, parts), own_parts(partition_ids)
            if needed is parts and not own:
                return whole
            return records.instruction({}, {**needed, **own}, self.config.wire.downlink)

        return chosen

    def trained(self, server_round: int, replies: Iterator[ClientReply]) -> Iterator[ClientReply]:
        """The replies that close the round; a method with several exchanges in a round makes the others here."""
        return replies

    def measured(self, server_round: int, replies: Iterator[ClientReply]) -> Iterator[ClientReply]:
        """The replies with sums; a method whose model is at the server makes the sums here."""
        return replies

    def heard(self, reply: ClientReply) -> None:
        """A valid evaluation has arrived; a method may learn from it where a client belongs."""

    @abstractmethod
    def checkpoint(self, server_round: int) -> Checkpointed:
        """Everything that the next round depends on."""

    @abstractmethod
    def restore(self, saved: Checkpointed) -> None:
        """Undo :meth:`checkpoint`."""

    @abstractmethod
    def arrays(self) -> ArrayRecord:
        """The global model as Flower's record."""
