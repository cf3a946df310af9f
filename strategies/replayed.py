"""Calibrated replay: a run goes through its rounds again without a client, in new directions and old lengths.

How long each update was, and what it weighed, is in the run's records, where a removal has put it; the updates
themselves are not needed.

Source:
    Liu, Ma, Yang, Wang, Liu 2021, FedEraser: its calibration and its update. Differs in that the first round is
    calibrated like the others, and not taken over as it was.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from strategies.exchange import ClientReply
from strategies.method import FederatedMethod
from strategies.observer import Observer
from strategies.private import Unprotected
from strategies.sift import joined, parted, set_model

KIND = "calibration"
"""Of the records: ``of_round``, ``partition_id``, ``weight`` and ``length``, the Euclidean norm of the old update."""


class Replayed(Unprotected):
    """Scales each new update to the length of its old one, and adds their mean with the old weights.

    Args:
        config: The run.
        observer: Has the old lengths and weights.

    Raises:
        ConfigError: It has none.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        super().__init__(config)
        self._old: dict[int, dict[int, tuple[float, float]]] = {}
        for record in observer.kept(KIND):
            of_round = self._old.setdefault(int(record["of_round"]), {})
            of_round[int(record["partition_id"])] = (
                float(record["weight"]),
                float(record["length"]),
            )
        if not self._old:
            raise ConfigError(
                "unlearning.removal=replay: expected a run that action=unlearn has prepared, got one without old "
                "lengths"
            )
        self._start: dict[str, np.ndarray] = {}
        self._total = np.zeros(0)
        self._weight = 0.0

    def cohort(self, server_round: int, partition_ids: Sequence[int]) -> list[int]:
        """Who gave an update in that round the first time, ascending."""
        return sorted(self._old.get(server_round, {}))

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start a round's sum."""
        super().begin(method, server_round)
        self._start = {n: values.copy() for n, values in method.start_values(server_round).items()}
        self._total, self._weight = np.zeros(joined(self._start).size), 0.0

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply as the method does, and add its calibrated update."""
        record = method.add_reply(reply, server_round)  # which checks it; that sum is thrown away
        update = joined(method.reply_values(reply, server_round)) - joined(self._start)
        weight, length = self._old[server_round][reply.partition_id]
        norm = float(np.linalg.norm(update.astype(np.float64)))
        if norm:
            self._total += update.astype(np.float64) * (weight * length / norm)
        self._weight += weight
        return record

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Close the round: the model moves by the weighted mean of calibrated updates."""
        if self._weight:
            moved = joined(self._start) + self._total / self._weight
            set_model(method, parted(moved.astype(np.float32), self._start), server_round)
