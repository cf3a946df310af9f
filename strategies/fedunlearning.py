"""What a run does so that clients can be taken out of it: it keeps their updates, and passes over those removed.

What "removed" means for training in rounds: a round's cohort is drawn among all clients as ever, and a removed client
that is drawn is passed over. A draw among fewer clients would change every cohort, also those before the client came.
So a run with ``unlearning.removed=[7]`` from its first round on is what every removal of client 7 has to equal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm_flwr.config import RunConfig
from fedllm_flwr.settings.unlearning import SIFT_MERGE
from fedllm_flwr.unlearning.ledger import Contribution
from strategies.exchange import ClientReply
from strategies.method import FederatedMethod
from strategies.observer import Observer
from strategies.private import Unprotected, protection_of
from strategies.replayed import Replayed
from strategies.robust import RobustMean
from strategies.sift import SiftMerge, joined


class Unlearnable(Unprotected):
    """Passes over removed clients and hands updates to the ledger; all else is done by what it is put around.

    Args:
        config: The run.
        observer: Has the ledger.
        inner: How replies merge.
    """

    def __init__(self, config: RunConfig, observer: Observer, inner: Unprotected) -> None:
        super().__init__(config)
        self.inner = inner
        self._observer = observer
        self._asked = 0

    def cohort(self, server_round: int, partition_ids: Sequence[int]) -> list[int]:
        """Who trains in a round, ascending: those of the draw who were not removed."""
        drawn = self.inner.cohort(server_round, partition_ids)
        return staying(self._config, drawn)

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start a round's sum."""
        self._asked = 0
        self.inner.begin(method, server_round)

    def asked(self, server_round: int, partition_ids: Sequence[int]) -> None:
        """These clients are about to be asked for updates."""
        self._asked += len(partition_ids)
        self.inner.asked(server_round, partition_ids)

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply and add it; what was added is also kept."""
        record = self.inner.add(method, reply, server_round)
        if self._config.unlearning.keeps_ledger:
            values = joined(method.reply_values(reply, server_round))
            update = values - joined(method.start_values(server_round))
            weight = method.weight_of(reply, int(record["num_examples"]))
            address = ("client", reply.partition_id, server_round)
            contribution = Contribution(reply.partition_id, weight, update, address)
            self._observer.contributed(server_round, contribution)
        return record

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Close the sum; where everybody who was drawn had been removed, the model stays as it is."""
        if self._asked:
            self.inner.finish(method, server_round)

    def is_spent(self) -> bool:
        """Whether a budget does not allow another round."""
        return self.inner.is_spent()

    def state(self) -> dict[str, Any]:
        """What the next round depends on, as JSON."""
        return self.inner.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.inner.restore(state)

    def arrays(self) -> dict[str, np.ndarray]:
        """What of it is arrays."""
        return self.inner.arrays()

    def restore_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo :meth:`arrays`."""
        self.inner.restore_arrays(arrays)

    def own_parts(self, partition_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """What these clients are served in place of the global model."""
        return self.inner.own_parts(partition_ids)


def staying(config: RunConfig, partition_ids: Sequence[int]) -> list[int]:
    """Those of some clients that were not removed, in their order."""
    return [p for p in partition_ids if p not in config.unlearning.removed]


def merging_of(config: RunConfig, observer: Observer) -> Unprotected:
    """How the replies of a run's rounds merge, and what is kept of them."""
    inner: Unprotected
    if config.strategy.name == SIFT_MERGE:
        inner = SiftMerge(config)
    elif config.unlearning.removal == "replay":
        inner = Replayed(config, observer)
    elif config.robust.name != "none":
        inner = RobustMean(config, observer)
    else:
        inner = protection_of(config, observer)
    if config.unlearning.keeps_ledger or config.unlearning.removed:
        return Unlearnable(config, observer, inner)
    return inner
