"""Federated calibration: a threshold for the clients' tier from counts alone.

Each client answers with 2 (k + 1) integers: for every agreement that k members can have, how many of its held-out
queries were answered at it, and how many of them rightly. The counts of all clients are those of their pooled queries,
so the threshold is that of pooled data, to the bit, and only a sum is needed. Neither text, answer nor label is sent.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.cascade import Calibrated, Histogram, levels_of, solve
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.settings.cascade import CascadeConfig
from strategies.client_tier import Account, ClientTier, whole_numbers
from strategies.exchange import by_client, stream
from strategies.hosting import Hosting


class FederatedCalibration(ClientTier):
    """Sums the clients' histograms and solves for θ.

    Attributes:
        counts: The sum, once it is there.
        calibrated: The threshold, once it is there.

    Args:
        config: As in the base class, as are ``hosting``, ``account`` and ``tier``.
        hosting: See there.
        account: See there.
        tier: See there.
        cascade: Risk and confidence, and how many members the first tier has.
    """

    def __init__(
        self,
        config: RunConfig,
        hosting: Hosting,
        account: Account,
        tier: tuple[Mapping[str, Any], Mapping[str, np.ndarray]],
        cascade: CascadeConfig,
    ) -> None:
        super().__init__(config, hosting, account, tier)
        self.cascade = cascade
        self.edges = levels_of(cascade.tiers[0].size)
        self.counts: Histogram | None = None
        self.calibrated: Calibrated | None = None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask every client for its histogram over its validation rows."""
        self._sent = self._messages(records.CALIBRATE, server_round, self.clients, {})
        return self._sent

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Add up what is valid, and solve.

        Raises:
            RunStoppedError: Too few clients answered.
        """
        zeros = np.zeros(len(self.edges), dtype=np.int64)
        total = Histogram(self.edges, zeros, zeros)
        good = 0
        for reply in by_client(self._sent, replies):
            try:
                parts = [whole_numbers(reply, name, len(zeros)) for name in ("correct", "total")]
                total = total + Histogram(self.edges, *parts)
            except (WireError, ShapeError) as error:
                self.account.failure(server_round, reply.partition_id, str(error))
                continue
            good += 1
        self._enough(good, len(self.clients), "calibration")
        self.counts = total
        chosen = self.cascade
        self.calibrated = solve(total, chosen.risk, chosen.confidence, chosen.among)
        found = self.calibrated
        return MetricRecord(
            {"theta": found.theta, "accepted": found.accepted, "errors": found.errors,
             "queries": found.total, "clients": good}
        )  # fmt: skip

    def calibrate(self, grid: Grid) -> Calibrated:
        """The one exchange, wave by wave.

        Raises:
            RunStoppedError: Too few clients answered, or a simulation worker died.
        """
        messages = self.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)
        seconds = self.config.strategy.round_timeout_seconds
        self.aggregate_evaluate(1, stream(grid, messages, seconds, self.account.count))
        assert self.calibrated is not None  # noqa: S101  # set by the line before
        return self.calibrated
