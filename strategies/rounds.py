"""The loop over rounds that every strategy of this project shares: cohorts, waves, retries, evaluation, resume.

Flower's own ``start`` has no checkpoints, always begins at round 1 and holds a whole cohort in memory. This one calls
the same hooks (``configure_train``, ``aggregate_train``, ``configure_evaluate``, ``aggregate_evaluate``) in the same
order, so a strategy also runs under Flower's.
"""

import json
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import RunStoppedError, ShapeError, WireError
from strategies.exchange import ClientReply, by_client, checked_number, messages_for, stream
from strategies.hosting import Hosting
from strategies.sampling import draw_cohort


class TooFewRepliesError(RunStoppedError):
    """Too few clients of a cohort gave a good reply, several times over."""


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

    def evaluated(self, record: dict[str, Any]) -> None:
        """One client's evaluation has arrived."""

    def finished(self, record: dict[str, Any], checkpoint: "Checkpointed") -> None:
        """A round is complete: keep its record, then its checkpoint."""


@dataclass(frozen=True)
class Checkpointed:
    """What a strategy needs to go on after a round."""

    server_round: int
    arrays: Mapping[str, np.ndarray]
    state: Mapping[str, Any]


@dataclass
class Tally:
    """Sums of one evaluation over clients, kept apart from their counts until the end."""

    correct: int = 0
    total: int = 0
    loss_sum: float = 0.0
    label_tokens: int = 0
    characters: int = 0

    def add(self, sums: Mapping[str, Any]) -> None:
        """Add one client's sums."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + sums[name])

    def figures(self, kind: str) -> dict[str, float]:
        """Accuracy (where there are labels), mean loss, and bits per character (where there is text)."""
        found: dict[str, float] = {}
        if kind == "classification" and self.total:
            found["accuracy"] = self.correct / self.total
        if self.label_tokens:
            found["loss"] = self.loss_sum / self.label_tokens
        if kind == "instruction" and self.characters:
            found["bits_per_character"] = self.loss_sum / math.log(2) / self.characters
        return found


class RoundStrategy(Strategy):
    """A strategy whose rounds stream, retry, evaluate and checkpoint.

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
        self.evaluated_ids = self.partition_ids
        self.evaluated_splits: tuple[str, ...] = ("validation", "test")
        self.template = config.task.template
        self._sent: list[Message] = []
        self._left_to_train: list[int] = []
        self._round_figures: dict[str, Any] = {}

    # What a method has to say ------------------------------------------------------------------------------------

    @abstractmethod
    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Body and arrays of a round's training or evaluation messages."""

    @abstractmethod
    def begin_sum(self, server_round: int) -> None:
        """Start a new sum."""

    @abstractmethod
    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Validate one client's reply and add it to the sum; returns the client's record.

        Raises:
            WireError, ShapeError: The reply is not valid; nothing has been added.
        """

    @abstractmethod
    def finish_sum(self, server_round: int) -> None:
        """Turn the sum into the next global model."""

    @abstractmethod
    def checkpoint(self, server_round: int) -> Checkpointed:
        """Everything that the next round depends on."""

    @abstractmethod
    def restore(self, saved: Checkpointed) -> None:
        """Undo :meth:`checkpoint`."""

    @abstractmethod
    def arrays(self) -> ArrayRecord:
        """The global model as Flower's record."""

    # Flower's hooks ----------------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Flower's hook for a start-up log line; the run directory's manifest says it all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages to the nodes that host this round's cohort (or, in a retry, what is left of it)."""
        if not self._left_to_train or self._round_figures["round"] != server_round:
            self._left_to_train = draw_cohort(
                self.config.seed,
                server_round,
                self.partition_ids,
                self.config.strategy.cohort_fraction,
            )
            self.begin_sum(server_round)
            cohort = list(self._left_to_train)
            self._round_figures = {
                "round": server_round,
                "cohort": cohort,
                "losses": [],
                "weights": [],
            }
        body, parts = self.broadcast(server_round, train=True)
        content = records.instruction({}, parts, self.config.wire.downlink)
        self._sent = messages_for(
            self.hosting,
            content,
            {**self._common(server_round), **body},
            message_type=records.TRAIN,
            partition_ids=self._left_to_train,
            clients_per_wave=self.config.runtime.clients_per_wave,
            server_round=server_round,
        )
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add every valid reply to the sum; close the round if enough of the cohort is good.

        Returns:
            The global model and the mean training loss; ``(None, None)`` if too few replies are good.

        Raises:
            RunStoppedError: A simulation worker died.
        """
        figures = self._round_figures
        left = []
        for reply in by_client(self._sent, replies):
            if reply.stray:
                self.observer.failure(server_round, reply.partition_id, reply.error)
                continue
            try:
                if reply.error:
                    raise WireError(reply.error)
                record = self.add_reply(reply, server_round)
            except (WireError, ShapeError) as error:
                left.append(reply.partition_id)
                self.observer.failure(server_round, reply.partition_id, str(error))
                continue
            figures["losses"].append(record["loss"])
            figures["weights"].append(record["num_examples"])
            self.observer.client(record)
            del reply  # or its node's whole answer would stay while the next wave trains
        good = len(figures["losses"])
        if good < math.ceil(self.config.strategy.min_fraction * len(figures["cohort"])):
            self._left_to_train = left
            return None, None
        self._left_to_train = []
        figures["dropped"] = left
        self.finish_sum(server_round)
        loss = float(np.average(figures["losses"], weights=figures["weights"]))
        return self.arrays(), MetricRecord(
            {"train-loss": loss, records.NUM_EXAMPLES: sum(figures["weights"])}
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages that ask every client to evaluate the global model on its own held-out rows."""
        body, parts = self.broadcast(server_round, train=False)
        body |= {
            **self._common(server_round),
            "splits": list(self.evaluated_splits),
            "template": self.template,
        }
        content = records.instruction({}, parts, self.config.wire.downlink)
        self._sent = messages_for(
            self.hosting,
            content,
            body,
            message_type=records.EVALUATE,
            partition_ids=self.evaluated_ids,
            clients_per_wave=max(self.config.runtime.clients_per_wave, 4 * self.hosting.num_nodes),
            server_round=server_round,
        )
        return self._sent

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Sum the clients' sums; clients that did not answer are named and left out."""
        tallies = {split: Tally() for split in self.evaluated_splits}
        own_accuracy = []
        for reply in by_client(self._sent, replies):
            try:
                splits = _checked_sums(reply, self.evaluated_splits)
            except WireError as error:
                self.observer.failure(server_round, reply.partition_id, f"evaluation: {error}")
                continue
            record = {
                "kind": "evaluation",
                "round": server_round,
                "partition_id": reply.partition_id,
            }
            for split, sums in splits.items():
                tallies[split].add(sums)
                self.observer.evaluated({**record, "split": split, **sums})
            test = splits.get("test", {})
            if test.get("total") and self.task_kind == "classification":
                own_accuracy.append(test["correct"] / test["total"])
        found = tallies["test"].figures(self.task_kind) if "test" in tallies else {}
        if "validation" in tallies:
            found |= {
                f"validation_{k}": v
                for k, v in tallies["validation"].figures(self.task_kind).items()
            }
        if own_accuracy:
            found["worst_client_accuracy"] = min(own_accuracy)
        return MetricRecord(dict(found)) if found else None

    # The loop ----------------------------------------------------------------------------------------------------

    def start(  # type: ignore[override]
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        resume_from: Checkpointed | None = None,
    ) -> Result:
        """Run the rounds that are left.

        Args:
            grid: Flower's transport.
            initial_arrays: Not used: the server draws its first adapter from the seed.
            num_rounds: Rounds of the whole run; 0 = the configuration's.
            timeout: Seconds for the messages of one round; 0 = the configuration's.
            train_config: Not used: everything a client needs is in the resolved configuration.
            evaluate_config: Not used, for the same reason.
            evaluate_fn: Optional evaluation at the server, as in Flower.
            resume_from: A checkpoint; rounds up to its own are not run again.

        Raises:
            TooFewRepliesError: Too few clients answered, several times over. The last checkpoint is intact.
            RunStoppedError: A simulation worker died. The last checkpoint is intact.
        """
        rounds = num_rounds or self.config.num_rounds
        seconds = timeout or self.config.strategy.round_timeout_seconds
        result = Result()
        first = 1
        if resume_from is not None:
            self.restore(resume_from)
            first = resume_from.server_round + 1
        else:
            self._complete(grid, 0, seconds, rounds, result, {})
        for server_round in range(first, rounds + 1):
            began = time.monotonic()
            self.hosting.refresh()
            metrics = self._train_until_enough(grid, server_round, seconds)
            result.train_metrics_clientapp[server_round] = metrics
            record = {
                "train_loss": float(metrics["train-loss"]),  # type: ignore[arg-type]
                "num_examples": int(metrics[records.NUM_EXAMPLES]),  # type: ignore[arg-type]
                "cohort": self._round_figures["cohort"],
                "dropped_replies": len(self._round_figures["dropped"]),
                "train_seconds": time.monotonic() - began,
            }
            self._complete(grid, server_round, seconds, rounds, result, record)
            if (
                evaluate_fn is not None
                and (found := evaluate_fn(server_round, self.arrays())) is not None
            ):
                result.evaluate_metrics_serverapp[server_round] = found
        result.arrays = self.arrays()
        return result

    def _train_until_enough(self, grid: Grid, server_round: int, seconds: float) -> MetricRecord:
        """One round, retried for the clients that failed until enough of the cohort is good."""
        empty = ConfigRecord()
        self._left_to_train = []
        for attempt in range(self.config.strategy.max_retries + 1):
            messages = self.configure_train(server_round, self.arrays(), empty, grid)
            if attempt == 0:
                self.observer.started(server_round, self._round_figures["cohort"])
            replies = stream(grid, messages, seconds, self.observer.count)
            _, metrics = self.aggregate_train(server_round, replies)
            if metrics is not None:
                return metrics
            self.hosting.refresh()
        cohort = self._round_figures["cohort"]
        raise TooFewRepliesError(
            f"round {server_round}: {len(self._round_figures['losses'])} of {len(cohort)} clients gave a good reply "
            f"in {self.config.strategy.max_retries + 1} attempts; "
            f"strategy.min_fraction={self.config.strategy.min_fraction} asks for "
            f"{math.ceil(self.config.strategy.min_fraction * len(cohort))}"
        )

    def _complete(
        self,
        grid: Grid,
        server_round: int,
        seconds: float,
        rounds: int,
        result: Result,
        record: dict[str, Any],
    ) -> None:
        """Evaluate if it is this round's turn, then hand the round's record and checkpoint to the observer."""
        began = time.monotonic()
        due = server_round % self.config.evaluate_every == 0 or server_round == rounds
        if due and self.evaluated_splits:
            messages = self.configure_evaluate(server_round, self.arrays(), ConfigRecord(), grid)
            metrics = self.aggregate_evaluate(
                server_round, stream(grid, messages, seconds, self.observer.count)
            )
            if metrics is not None:
                result.evaluate_metrics_clientapp[server_round] = metrics
                record |= dict(metrics)
            record["evaluate_seconds"] = time.monotonic() - began
        self.observer.finished(
            {"kind": "round", "round": server_round, "rounds": rounds, **record},
            self.checkpoint(server_round),
        )

    def _common(self, server_round: int) -> dict[str, Any]:
        return {
            "config": json.loads(self.config.to_json()),
            "fingerprint": self.config.fingerprint(),
            "server-round": server_round,
        }


def _checked_sums(reply: ClientReply, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A client's evaluation sums by split, each of them a number.

    Raises:
        WireError: The client did not answer, or a sum is absent or not finite.
    """
    if reply.error:
        raise WireError(reply.error)
    client = f"client {reply.partition_id}"
    splits: Any = reply.info.get("splits")
    right = isinstance(splits, dict) and set(splits) == set(wanted)
    if not right or not all(isinstance(sums, dict) for sums in splits.values()):
        raise WireError(f"{client}: expected the splits {', '.join(wanted)}, got {splits!r:.60}")
    return {
        split: {
            name: checked_number(client, splits[split], name, whole=name != "loss_sum")
            for name in Tally.__dataclass_fields__
        }
        for split in wanted
    }
