"""Differential privacy around any strategy whose aggregate is a mean of equally shaped parts.

Under central noise the strategy's own sum is replaced by one of clipped updates, which comes back to it, with noise, as
the reply of a single client. So rules, server optimizers and checkpoints know nothing of it.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import WireError
from fedllm_flwr.privacy import ClippedMean, next_clip_norm
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.settings.accounts import noised_steps
from fedllm_flwr.settings.methods import FedLoraConfig
from fedllm_flwr.settings.privacy import (
    CentralPrivacy,
    LocalPrivacy,
    NoPrivacy,
    SamplePrivacy,
)
from strategies.exchange import ClientReply
from strategies.figures import training_figures
from strategies.ledger import Ledger
from strategies.method import FederatedMethod
from strategies.observer import Observer
from strategies.row_ledger import RowLedger
from strategies.sampling import draw_cohort, draw_poisson_cohort

NO_FIGURES = {"num-examples": 1, "steps": 0, "tokens": 0, "loss": 0.0, "cpu-seconds": 0.0}
"""Of the reply that stands for a whole cohort: what a reply must say, and nobody reads."""


class Unprotected:
    """``privacy=none``: replies go to the strategy as they come. One round is cohort, begin, asked, add …, finish.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def cohort(self, server_round: int, partition_ids: Sequence[int]) -> list[int]:
        """Who trains in a round, ascending."""
        fraction = self._config.strategy.cohort_fraction
        return draw_cohort(self._config.seed, server_round, partition_ids, fraction)

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start a round's sum."""
        method.begin_sum(server_round)

    def asked(self, server_round: int, partition_ids: Sequence[int]) -> None:
        """These clients are about to be asked for updates, for the first time in a round or again."""

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply and add it to the sum; returns the client's record.

        Raises:
            WireError, ShapeError: The reply is not valid; nothing has been added.
        """
        return method.add_reply(reply, server_round)

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Close the sum into the next global model."""
        method.finish_sum(server_round)

    def is_spent(self) -> bool:
        """Whether the budget does not allow another round."""
        return False

    def state(self) -> dict[str, Any]:
        """What the next round depends on, as JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What of it is arrays, for a checkpoint."""
        return {}

    def restore_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo :meth:`arrays`; a checkpoint's other arrays are there too."""

    def own_parts(self, partition_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """What these clients are served to evaluate in place of the global model, as ``served/<client>``."""
        return {}


class CentralNoise(Unprotected):
    """Clips each client's update and adds noise to their sum, over a denominator that the settings give.

    Args:
        config: The run.
        observer: Keeps the ledger.

    Source:
        McMahan et al. 2018, Learning differentially private recurrent language models, Algorithm 1, with flat
        clipping and uniform weights; Andrew et al. 2021 for a clip norm that moves. Differs in that the noised mean
        may go through a server optimizer, which costs nothing.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        super().__init__(config)
        privacy = config.privacy
        assert isinstance(privacy, CentralPrivacy)  # noqa: S101  # see protection_of
        self._privacy = privacy
        self._expected = privacy.expected_clients(
            config.partition.num_clients, config.strategy.cohort_fraction
        )
        self._ledger = Ledger(config, observer)
        self._clip_norm = privacy.clip_norm
        self._sum = ClippedMean({}, self._clip_norm)
        self._counted: set[int] = set()

    def cohort(self, server_round: int, partition_ids: Sequence[int]) -> list[int]:
        """Who trains in a round; from the operating system, since every node knows the run's seed."""
        draw = draw_poisson_cohort if self._privacy.cohort == "poisson" else draw_cohort
        seed = self._config.seed if self._privacy.is_seeded else secrets.randbits(63)
        return draw(seed, server_round, partition_ids, self._config.strategy.cohort_fraction)

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start a round's sum, from what its clients begin with."""
        super().begin(method, server_round)
        self._sum = ClippedMean(method.start_values(server_round), self._clip_norm)
        self._counted = set()

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply as the strategy does, clip its update and add it; a client counts once."""
        if reply.partition_id in self._counted:
            raise WireError(
                f"client {reply.partition_id}: expected one update in round {server_round}, got another"
            )
        record = method.add_reply(reply, server_round)  # which checks it; that sum is thrown away
        norm = self._sum.add(method.reply_values(reply, server_round))
        self._counted.add(reply.partition_id)
        return record | {"update_norm": norm, "is_clipped": norm > self._clip_norm}

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Charge the account, add the noise, and close the strategy's sum over the result alone."""
        privacy, total = self._privacy, self._sum
        self._ledger.spend(server_round, (), self._clip_norm)
        random = (
            numpy_generator(self._config.seed, "privacy", server_round)
            if privacy.is_seeded
            else np.random.default_rng()
        )
        parts = total.result(self._expected, privacy.sum_noise(self._expected), random)
        method.begin_sum(server_round)
        method.add_reply(ClientReply(records.POOLED, NO_FIGURES, parts), server_round)
        super().finish(method, server_round)
        if privacy.clip_quantile:
            self._clip_norm = next_clip_norm(
                self._clip_norm,
                below=total.below,
                count=total.count,
                expected_clients=self._expected,
                quantile=privacy.clip_quantile,
                learning_rate=privacy.clip_learning_rate,
                count_noise=privacy.count_deviation(self._expected),
                generator=random,
            )

    def is_spent(self) -> bool:
        """Whether the budget does not allow another round."""
        return self._ledger.is_spent()

    def state(self) -> dict[str, Any]:
        """The clip norm; the ledger is in the run's records."""
        return {"clip_norm": self._clip_norm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`."""
        self._clip_norm = float(state["clip_norm"])


class LocalNoise(Unprotected):
    """Keeps account of the noised updates that clients send; clipping and noise are theirs (``clients.private``).

    Args:
        config: The run.
        observer: Keeps the ledger.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        super().__init__(config)
        assert isinstance(config.privacy, LocalPrivacy)  # noqa: S101  # see protection_of
        self._clip_norm = config.privacy.clip_norm
        self._ledger = Ledger(config, observer)

    def asked(self, server_round: int, partition_ids: Sequence[int]) -> None:
        """Charge every client that is asked: whether its answer arrives is not known to it."""
        self._ledger.spend(server_round, partition_ids, self._clip_norm)

    def is_spent(self) -> bool:
        """Whether some client cannot afford another round."""
        return self._ledger.is_spent()


class RowNoise(Unprotected):
    """Keeps account of what training by noised steps has cost the rows of each client; the noise is the clients'.

    Args:
        config: The run.
        observer: Keeps the ledger.
    """

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        super().__init__(config)
        self._ledger = RowLedger(config, observer)
        self._rows: dict[int, int] = {}

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start a round's sum."""
        super().begin(method, server_round)
        self._rows = {}

    def asked(self, server_round: int, partition_ids: Sequence[int]) -> None:
        """Charge every client that is asked: whether its answer arrives is not known to it."""
        self._ledger.ask(server_round, partition_ids)

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply and add it; remember how many rows its client has.

        Raises:
            WireError: Also if the client has taken other steps than the account holds.
        """
        told = training_figures(f"client {reply.partition_id}", reply.info, may_withhold=True)
        if told["num_examples"] > 0:  # the method refuses others
            _, steps = noised_steps(self._config.client, told["num_examples"])
            if told["steps"] != steps:
                raise WireError(
                    f"client {reply.partition_id}: expected {steps} noised steps over {told['num_examples']} rows, "
                    f"got {told['steps']}"
                )
        record = super().add(method, reply, server_round)
        self._rows[reply.partition_id] = record["num_examples"]
        return record

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Close the sum, and say what the round has cost."""
        super().finish(method, server_round)
        self._ledger.learn(server_round, self._rows)

    def is_spent(self) -> bool:
        """Whether the rows of some client cannot afford another round."""
        return self._ledger.is_spent()


def protection_of(config: RunConfig, observer: Observer) -> Unprotected:
    """The protection that a run's configuration asks for."""
    if isinstance(config.privacy, CentralPrivacy):
        return CentralNoise(config, observer)
    if isinstance(config.privacy, LocalPrivacy):
        return LocalNoise(config, observer)
    if isinstance(config.privacy, SamplePrivacy):
        return RowNoise(config, observer)
    return Unprotected(config)


def privacy_notes(config: RunConfig) -> list[str]:
    """What is allowed and still worth a line when a run begins."""
    privacy, method, clients = config.privacy, config.method, config.partition.num_clients
    if isinstance(privacy, NoPrivacy) or not privacy.noise_multiplier:
        return []
    found = []
    if privacy.target_epsilon:
        found.append(
            f"privacy.target_epsilon={privacy.target_epsilon:g}: privacy.noise_multiplier={privacy.noise_multiplier:g} "
            f"keeps it over {config.num_rounds} rounds"
        )
    if isinstance(privacy, SamplePrivacy):
        found.append(
            "privacy=sample: ε is of single rows in what clients send for training; their numbers of rows and their "
            "evaluations are sent without noise"
        )
    elif privacy.delta >= 1 / clients:
        found.append(
            f"privacy.delta={privacy.delta:g} and partition.num_clients={clients}: a mechanism that publishes one "
            f"client whole would pass; use less than {1 / clients:.3g}"
        )
    if isinstance(method, FedLoraConfig) and method.sharing == "both":
        found.append(
            f"method.sharing=both and privacy={privacy.name}: noise on A and on B is multiplied, and grows with its "
            "square; method.sharing=b_only or alternating keeps it linear, and the mean exact"
        )
    if isinstance(privacy, CentralPrivacy) and privacy.reproducible_noise:
        found.append(
            "privacy.reproducible_noise=true: every node knows the seed and can subtract the noise; ε is what fresh "
            "noise would give"
        )
    if isinstance(privacy, LocalPrivacy):
        found.append(
            "privacy=local: ε is of the updates; clients' losses, counts and evaluations are sent without noise"
        )
    if config.baselines.local_only or config.baselines.centralised:
        found.append(
            f"baselines.local_only, baselines.centralised and privacy={privacy.name}: these train and send without "
            "noise, and ε is not of what they send"
        )
    return found
