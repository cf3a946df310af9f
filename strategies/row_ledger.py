"""The account of single rows' privacy: what each client's training by noised steps has cost its rows.

Clients differ in how many rows they have, and so in the rate at which a step draws a row and in the steps of a round.
The ε of a run is that of the client whose rows have it worst.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.accounts import (
    bound_epsilon,
    exact_epsilon,
    noised_steps,
    rows_epsilon,
)
from fedllm_flwr.settings.privacy import SamplePrivacy
from strategies.ledger import KIND
from strategies.observer import Observer


class RowLedger:
    """Counts the rounds that each client has trained in, and knows how many rows it said it has.

    Args:
        config: The run, with ``privacy=sample``.
        observer: Keeps the records, and has those of earlier processes.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        assert isinstance(config.privacy, SamplePrivacy)  # noqa: S101  # see protection_of
        self._privacy, self._client, self._observer = config.privacy, config.client, observer
        self._asked: Counter[int] = Counter()
        self._rows: dict[int, int] = {}
        for record in observer.kept(KIND):
            if record["rows"]:
                self._rows |= {int(p): int(n) for p, n in record["rows"].items()}
            self._asked.update(record["clients"])

    def epsilon(self, further_rounds: int = 0) -> float | None:
        """The largest ε over all clients; None before any has said how many rows it has.

        A client that was asked and has never said it, since its answers were lost, counts as each of those that have.

        Args:
            further_rounds: Rounds to come in which every client takes part.
        """
        known = {p: noised_steps(self._client, rows) for p, rows in self._rows.items()}
        others = set(known.values())
        accounts = {
            (rate, steps * (self._asked[p] + further_rounds))
            for p in known.keys() | self._asked.keys()
            for rate, steps in ([known[p]] if p in known else others)
        }
        accounts = {(rate, steps) for rate, steps in accounts if steps}
        if not accounts:
            return None
        return rows_epsilon(self._privacy.noise_multiplier, self._privacy.delta, accounts)

    def is_spent(self) -> bool:
        """Whether another round could exceed the budget for some client; never without one."""
        budget = self._privacy.epsilon_budget
        if not budget:
            return False
        expected = self.epsilon(1)
        return expected is not None and expected > budget

    def ask(self, server_round: int, clients: Sequence[int]) -> None:
        """Write down that clients are about to train, before they are asked: an answer that is lost has been given."""
        self._asked.update(clients)
        self._write(server_round, clients, {})

    def learn(self, server_round: int, rows: dict[int, int]) -> None:
        """Write down how many rows the clients of a round have, and say so once if δ is large beside them."""
        before = max(self._rows.values(), default=0)
        self._rows |= rows
        most, delta = max(self._rows.values(), default=0), self._privacy.delta
        if before * delta < 1 <= most * delta:
            text = (
                f"privacy.delta={delta:g} and a client with {most} rows: a mechanism that publishes one row whole "
                f"would pass; use less than {1 / most:.3g}"
            )
            self._observer.evaluated({"kind": "event", "round": server_round, "text": text})
        self._write(server_round, (), rows)

    def _write(self, server_round: int, clients: Sequence[int], rows: dict[int, int]) -> None:
        privacy = self._privacy
        record: dict[str, Any] = {
            "kind": KIND,
            "of_round": server_round,
            "mechanism": privacy.name,
            "releases": max(self._asked.values(), default=0),
            "noise_multiplier": privacy.noise_multiplier,
            "clip_norm": privacy.clip_norm,
            "delta": privacy.delta,
            "epsilon": self.epsilon(),
            "clients": list(clients),
            "rows": {str(p): n for p, n in sorted(rows.items())},
            "neighbours": "row added or removed",
        }
        self._observer.evaluated(record)


def check_row_budget(config: RunConfig, rows: Sequence[int]) -> None:
    """Find out whether every client's rows can afford the first round.

    Args:
        config: The run.
        rows: Training rows of each client.

    Raises:
        ConfigError: Some cannot.
    """
    privacy = config.privacy
    if not isinstance(privacy, SamplePrivacy) or not privacy.epsilon_budget:
        return
    for n in sorted({n for n in rows if n}):
        rate, steps = noised_steps(config.client, n)
        least = bound_epsilon(privacy.noise_multiplier, steps, privacy.delta, rate)
        if least > privacy.epsilon_budget:
            least = exact_epsilon(privacy.noise_multiplier, steps, privacy.delta, rate)
        if least > privacy.epsilon_budget:
            raise ConfigError(
                f"privacy.epsilon_budget: expected at least {least:.4g}, what one round costs the rows of a client "
                f"with {n} of them, got {privacy.epsilon_budget:g}"
            )
