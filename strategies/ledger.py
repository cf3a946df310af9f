"""The account of a run's differential privacy: what was released, the ε that it has cost, and what may still be spent.

A release is written down before what it releases can leave, in a record that belongs to no round: a run that was
killed, and repeats a round when it goes on, has released twice, and its ledger says so.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.privacy import sum_rdp_epsilon
from fedllm_flwr.settings.accounts import epsilon_of
from fedllm_flwr.settings.federation import cohort_size
from fedllm_flwr.settings.privacy import CentralPrivacy, LocalPrivacy
from strategies.observer import Observer

KIND = "privacy"
"""Of the ledger's records."""


def check_budget(config: RunConfig) -> None:
    """Find out whether a run can afford its first round.

    Raises:
        ConfigError: It cannot.
    """
    privacy = config.privacy
    if not isinstance(privacy, CentralPrivacy | LocalPrivacy) or not privacy.epsilon_budget:
        return
    least = epsilon_of(privacy, 1, config.partition.num_clients, config.strategy.cohort_fraction)
    if least > privacy.epsilon_budget:
        raise ConfigError(
            f"privacy.epsilon_budget: expected at least {least:.4g}, what one round costs, got "
            f"{privacy.epsilon_budget:g}"
        )


class Ledger:
    """Counts releases by client, or of sums over clients (see :func:`epsilon_of`).

    Args:
        config: The run, whose ``privacy`` is one with noise.
        observer: Keeps the records, and has those of earlier processes.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        privacy = config.privacy
        assert isinstance(privacy, CentralPrivacy | LocalPrivacy)  # noqa: S101  # a run without has no ledger
        self._privacy = privacy
        self._clients, self._fraction = (
            config.partition.num_clients,
            config.strategy.cohort_fraction,
        )
        self._observer = observer
        self._of_client: Counter[int] = Counter()
        self.releases = 0
        for record in observer.kept(KIND):
            self._count(record["clients"])

    def epsilon(self, releases: int) -> float:
        """The ε after so many releases."""
        return epsilon_of(self._privacy, releases, self._clients, self._fraction)

    def is_spent(self) -> bool:
        """Whether another release would exceed the budget; never without one."""
        budget = self._privacy.epsilon_budget
        return budget > 0 and self.epsilon(self.releases + 1) > budget

    def spend(self, server_round: int, clients: Sequence[int], clip_norm: float) -> None:
        """Write down a release that is about to happen.

        Args:
            server_round: The round that it belongs to.
            clients: Who is asked for a noised update; empty under central noise, where each client is charged.
            clip_norm: What updates are clipped to.

        Raises:
            RunStoppedError: The budget does not allow it; nothing was written down.
        """
        if self.is_spent():
            raise RunStoppedError(
                f"round {server_round}: privacy.epsilon_budget={self._privacy.epsilon_budget:g} does not allow another "
                f"release, which would cost {self.epsilon(self.releases + 1):.4g} in all"
            )
        self._count(clients)
        self._observer.evaluated(self._record(server_round, clients, clip_norm))

    def _count(self, clients: Sequence[int]) -> None:
        if isinstance(self._privacy, CentralPrivacy):
            self.releases += 1
            return
        self._of_client.update(clients)
        self.releases = max(self._of_client.values(), default=0)

    def _record(
        self, server_round: int, clients: Sequence[int], clip_norm: float
    ) -> dict[str, Any]:
        """What the account rests on, and what it says; an ε that is infinite is stored as null."""
        privacy, releases = self._privacy, self.releases
        record = {
            "kind": KIND,
            "of_round": server_round,
            "mechanism": privacy.name,
            "releases": releases,
            "noise_multiplier": privacy.noise_multiplier,
            "clip_norm": clip_norm,
            "delta": privacy.delta,
            "epsilon": self.epsilon(releases),
            "clients": list(clients),
        }
        if isinstance(privacy, LocalPrivacy):
            return record | {"neighbours": "replaced"}
        if privacy.cohort == "fixed":
            rate = cohort_size(self._clients, self._fraction) / self._clients
            neighbours = "replaced" if rate < 1 else "added or removed"
            return record | {"sampling_rate": rate, "neighbours": neighbours}
        bound = sum_rdp_epsilon(privacy.noise_multiplier, releases, privacy.delta, self._fraction)
        return record | {
            "sampling_rate": self._fraction,
            "neighbours": "added or removed",
            "rdp_epsilon": bound,
        }
