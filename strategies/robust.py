"""A robust mean around any strategy whose aggregate is a mean of equally shaped parts.

Replies are checked and kept; when a round closes, the robust mean of their updates comes back to the strategy as the
reply of a single client, so rules, server optimizers and checkpoints know nothing of it. Unlike the plain sum, which
streams, this holds all updates of a cohort: clients · values · 4 bytes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm_flwr import records
from fedllm_flwr.averaging import robust
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.settings.robust import RobustConfig
from strategies.exchange import ClientReply
from strategies.method import FederatedMethod
from strategies.observer import Observer
from strategies.private import NO_FIGURES, Unprotected


class RobustMean(Unprotected):
    """Puts a robust mean in the place of the strategy's own.

    Args:
        config: The run; ``robust`` is not ``none``.
        observer: Is told whom Krum chose.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        super().__init__(config)
        self._robust = config.robust
        self._observer = observer
        self._start: dict[str, np.ndarray] = {}
        self._updates: dict[int, np.ndarray] = {}

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start a round, from what its clients begin with."""
        super().begin(method, server_round)
        self._start = method.start_values(server_round)
        self._updates = {}

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply as the strategy does and keep its update; a client counts once."""
        client = reply.partition_id
        if client in self._updates:
            raise WireError(
                f"client {client}: expected one update in round {server_round}, got another"
            )
        record = method.add_reply(reply, server_round)  # which checks it; that sum is thrown away
        update = flat_update(method.reply_values(reply, server_round), self._start)
        self._updates[client] = update
        return record | {"update_norm": float(np.linalg.norm(update.astype(np.float64)))}

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Close the strategy's sum over the robust mean alone."""
        clients = sorted(self._updates)
        updates = np.stack([self._updates[client] for client in clients])
        self._updates = {}
        mean, chosen = robust_mean(updates, self._robust)
        if chosen is not None:
            self._observer.evaluated(
                {
                    "kind": "chosen",
                    "round": server_round,
                    "partition_ids": [clients[i] for i in chosen],
                }
            )
        method.begin_sum(server_round)
        parts = added(mean, self._start)
        method.add_reply(ClientReply(records.POOLED, NO_FIGURES, parts), server_round)
        super().finish(method, server_round)


def robust_mean(updates: np.ndarray, chosen: RobustConfig) -> tuple[np.ndarray, list[int] | None]:
    """The mean of updates [c, n] that the settings ask for, float64 [n], and whom Krum chose (None for other rules)."""
    if chosen.name == "norm_bound":
        return robust.norm_bounded_mean(updates, chosen.norm_bound), None
    if chosen.name == "median":
        return robust.coordinate_median(updates), None
    if chosen.name == "trimmed_mean":
        return robust.trimmed_mean(updates, chosen.trimmed_fraction), None
    kept = robust.krum_chosen(updates, chosen.num_attackers, chosen.chosen_of(len(updates)))
    return updates[kept].mean(axis=0, dtype=np.float64), kept


def flat_update(values: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a client has changed, all parts in the start's order; float32 [n].

    Raises:
        ShapeError: It has other parts than it began with, or other sizes.
    """
    found, expected = ({name: v.size for name, v in parts.items()} for parts in (values, start))
    if found != expected:
        raise ShapeError(f"update: expected the parts {expected} as at the start, got {found}")
    return np.concatenate([values[name] - start[name] for name in start])


def added(update: np.ndarray, start: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo :func:`flat_update`: start plus update, by part, float32."""
    parts, position = {}, 0
    for name, values in start.items():
        step = update[position : position + values.size]
        parts[name] = (values + step).astype(np.float32)
        position += values.size
    return parts
