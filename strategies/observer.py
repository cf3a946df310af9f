"""Who is told what happens in a run, and what a strategy hands over after each round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import Message

from fedllm_flwr.unlearning.ledger import Contribution

MERGING = "merging/"
"""Prefix of a checkpoint's arrays that belong to how replies merge, and not to the method."""

UNMEASURED = "unmeasured"
"""Key of a checkpoint's state: the model was made without a training round, and has to be evaluated."""


@dataclass(frozen=True)
class Checkpointed:
    """What a strategy needs to go on after a round."""

    server_round: int
    arrays: Mapping[str, np.ndarray]
    state: Mapping[str, Any]


class Observer(Protocol):
    """Who is told what happens, and keeps it."""

    def count(self, kind: str, direction: str, message: Message) -> None:
        """A message crosses the wire."""

    def started(self, server_round: int, cohort: Sequence[int]) -> None:
        """A round begins."""

    def client(self, record: dict[str, Any]) -> None:
        """A client's reply has been added to the sum."""

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """A client's reply is missing or was dropped."""

    def contributed(self, server_round: int, contribution: Contribution) -> None:
        """A client's update has been added, in a run that keeps a ledger."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """One client's evaluation has arrived, a group's sums are complete, or noised values are about to leave."""

    def kept(self, kind: str) -> Sequence[dict[str, Any]]:
        """The records of a kind so far, those of earlier processes of the run included."""

    def finished(self, record: dict[str, Any], checkpoint: Checkpointed) -> None:
        """A round is complete: keep its record, then its checkpoint."""
