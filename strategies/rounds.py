"""The loop over rounds that every strategy of this project shares: cohorts, waves, retries, evaluation, resume.

Flower's own ``start`` has no checkpoints, always begins at round 1 and holds a whole cohort in memory. This one calls
the same hooks (``configure_train``, ``aggregate_train``, ``configure_evaluate``, ``aggregate_evaluate``) in the same
order, so a strategy also runs under Flower's.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError, ShapeError, WireError
from strategies.exchange import by_client, messages_for, stream
from strategies.fedunlearning import merging_of, staying
from strategies.method import FederatedMethod, no_parts
from strategies.observer import MERGING, UNMEASURED, Checkpointed
from strategies.tally import SplitTally, checked_groups, checked_splits


class TooFewRepliesError(RunStoppedError):
    """Too few clients of a cohort gave a good reply, several times over."""


class RoundStrategy(FederatedMethod):
    """A strategy whose rounds stream, retry, evaluate and checkpoint (see the base class for the arguments)."""

    def set_up(self) -> None:
        """Start the loop's own state; a method's own comes after it."""
        self.evaluated_ids = staying(self.config, self.partition_ids)
        self.evaluated_splits: tuple[str, ...] = ("validation", "test")
        self.template = self.config.task.template
        self.plain = False
        self.tuning: dict[str, Any] = {}
        self.privacy = merging_of(self.config, self.observer)
        self.run = uuid.uuid4().hex  # what clients keep for themselves belongs to one run
        self._sent: list[Message] = []
        self._left_to_train: list[int] = []
        self._round_figures: dict[str, Any] = {}

    # Flower's hooks ----------------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Flower's hook for a start-up log line; the run directory's manifest says it all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages to the nodes that host this round's cohort (or, in a retry, what is left of it)."""
        if not self._left_to_train or self._round_figures["round"] != server_round:
            self._left_to_train = self.privacy.cohort(server_round, self.partition_ids)
            self.privacy.begin(self, server_round)
            self.balance.begin()
            cohort = list(self._left_to_train)
            self._round_figures = {
                "round": server_round,
                "cohort": cohort,
                "good": 0,
                "num_examples": 0,
                "losses": [],
            }
        self.privacy.asked(server_round, self._left_to_train)
        body, parts = self.broadcast(server_round, train=True)
        self._sent = messages_for(
            self.hosting,
            self.contents(parts),
            {**self._common(server_round), **body, **self.balance.instruction()},
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
        for reply in self.trained(server_round, by_client(self._sent, replies)):
            if reply.stray:
                self.observer.failure(server_round, reply.partition_id, reply.error)
                continue
            try:
                if reply.error:
                    raise WireError(reply.error)
                groups = self.balance.checked(reply)
                record = self.privacy.add(self, reply, server_round)
            except (WireError, ShapeError) as error:
                left.append(reply.partition_id)
                self.observer.failure(server_round, reply.partition_id, str(error))
                continue
            self.balance.add(reply.partition_id, groups)
            figures["good"] += 1
            figures["num_examples"] += record["num_examples"]
            if "loss" in record:
                figures["losses"].append((record["loss"], record["num_examples"]))
            self.observer.client(record)
            del reply  # or its node's whole answer would stay while the next wave trains
        if figures["good"] < self.config.strategy.enough(len(figures["cohort"])):
            self._left_to_train = left
            return None, None
        self._left_to_train = []
        figures["dropped"] = left
        self.privacy.finish(self, server_round)
        for line in self.balance.finish(server_round):
            self.observer.evaluated(line)
        metrics = MetricRecord({records.NUM_EXAMPLES: figures["num_examples"]})
        if figures["losses"]:  # a cohort of coins may be empty, and private rows tell no loss
            losses, weights = zip(*figures["losses"], strict=True)
            metrics["train-loss"] = float(np.average(losses, weights=weights))
        return self.arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages that ask every client to evaluate a model on its own held-out rows.

        It is the global model, or the backbone alone (``plain``). With ``tuning`` (``tune-steps``, ``learning-rate``)
        each client trains it before, for itself.
        """
        body, parts = self.broadcast(server_round, train=False)
        if self.plain:
            parts = {}
        body |= {
            **self._common(server_round),
            **self.tuning,
            "splits": list(self.evaluated_splits),
            "template": self.template,
        }
        self._sent = messages_for(
            self.hosting,
            self.contents(parts, no_parts if self.plain else self.privacy.own_parts),
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
        tallies = {split: SplitTally() for split in self.evaluated_splits}
        for reply in self.measured(server_round, by_client(self._sent, replies)):
            try:
                splits = checked_splits(reply, self.evaluated_splits)
                groups = checked_groups(reply, self.evaluated_splits)
                self.heard(reply)
            except WireError as error:
                self.observer.failure(server_round, reply.partition_id, f"evaluation: {error}")
                continue
            record = {
                "kind": "evaluation",
                "round": server_round,
                "partition_id": reply.partition_id,
            }
            for split, sums in splits.items():
                tallies[split].add(sums, groups[split])
                self.observer.evaluated({**record, "split": split, **sums})
        found: dict[str, float] = {}
        for split, tally in tallies.items():
            prefix = "" if split == "test" else f"{split}_"
            figures = tally.figures(self.task_kind)
            found |= {f"{prefix}{name}": value for name, value in figures.items()}
            slack = self.balance.slack(tally.group_sums())
            if slack:
                found[f"{prefix}least_slack"] = min(slack.values())
            for name, whole in sorted(tally.groups.items()):
                self.observer.evaluated({"kind": "group", "round": server_round, "split": split,
                                         "group": name, **asdict(whole)})  # fmt: skip
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
            RunStoppedError: A simulation worker died, or too few clients have a node. The last checkpoint is intact.

        The run ends early, and as it should, before the round that the privacy budget does not allow.
        """
        rounds = num_rounds or self.config.num_rounds
        seconds = timeout or self.config.strategy.round_timeout_seconds
        result = Result()
        first = 1
        if resume_from is not None:
            self.resume(resume_from)
            first = resume_from.server_round + 1
            if resume_from.state.get(UNMEASURED):
                self._complete(grid, resume_from.server_round, seconds, rounds, result, {})
        else:
            self._complete(grid, 0, seconds, rounds, result, {})
        for server_round in range(first, rounds + 1):
            if self.privacy.is_spent():
                break
            began = time.monotonic()
            enough = self.config.strategy.enough(len(self.partition_ids))
            self.hosting.refresh(self.partition_ids, enough)
            metrics = self._train_until_enough(grid, server_round, seconds)
            result.train_metrics_clientapp[server_round] = metrics
            losses = {"train_loss": metrics["train-loss"]} if "train-loss" in metrics else {}
            record = {
                **losses,
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
        empty, wanted = ConfigRecord(), self.config.strategy
        self._left_to_train = []
        for attempt in range(wanted.max_retries + 1):
            messages = self.configure_train(server_round, self.arrays(), empty, grid)
            needed = wanted.enough(len(self._round_figures["cohort"]))
            if attempt == 0:
                self.observer.started(server_round, self._round_figures["cohort"])
            replies = stream(grid, messages, seconds, self.observer.count)
            _, metrics = self.aggregate_train(server_round, replies)
            if metrics is not None:
                return metrics
            self.hosting.refresh(self._left_to_train, needed - self._round_figures["good"])
        cohort = self._round_figures["cohort"]
        raise TooFewRepliesError(
            f"round {server_round}: {self._round_figures['good']} of {len(cohort)} clients gave a good reply "
            f"in {wanted.max_retries + 1} attempts; strategy.min_fraction={wanted.min_fraction} asks for {needed}"
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
        last = server_round == rounds or self.privacy.is_spent()
        due = last or server_round % self.config.evaluate_every == 0
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
            self.snapshot(server_round),
        )

    def snapshot(self, server_round: int) -> Checkpointed:
        """The method's checkpoint, with the multipliers of its groups and what its merging keeps."""
        saved = self.checkpoint(server_round)
        own = {"balance": self.balance.state(), "privacy": self.privacy.state(), "run": self.run}
        arrays = {MERGING + name: values for name, values in self.privacy.arrays().items()}
        return replace(saved, arrays={**saved.arrays, **arrays}, state={**saved.state, **own})

    def resume(self, saved: Checkpointed) -> None:
        """Undo :meth:`snapshot`."""
        own = {n: v for n, v in saved.arrays.items() if n.startswith(MERGING)}
        self.restore(replace(saved, arrays={n: v for n, v in saved.arrays.items() if n not in own}))
        self.balance.restore(saved.state["balance"])
        self.privacy.restore(saved.state["privacy"])
        self.privacy.restore_arrays({n.removeprefix(MERGING): v for n, v in own.items()})
        self.run = saved.state["run"]

    def _common(self, server_round: int) -> dict[str, Any]:
        return {
            "config": json.loads(self.config.to_json()),
            "fingerprint": self.config.fingerprint(),
            "server-round": server_round,
            "run": self.run,
        }
