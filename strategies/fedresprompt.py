"""FedResPrompt: clients' reservoirs make prompts of rows, the server's frozen model gives gradients for them.

What is federated is the controller between a client's reservoir and the model: W_out and P, or W_out alone. Prompts
and gradients are 4·m·d bytes a row each way and exchange; a controller is 4·(k·R + m·d·k) bytes each way and round.
That only prompts cross is not privacy: the server knows P and the reservoir, and can read b, and from it much of a
row's context, off every prompt. ``mode`` and the noise settings say what is done against it.

Axes: B rows, m tokens of a prompt, d width of the model's embeddings, k bottleneck, R readout.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedllm_flwr import records
from fedllm_flwr.averaging import RunningMean, State
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.models.prompt_start import prompt_width
from fedllm_flwr.reservoir import Controller, Reservoir, cross_entropy
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedResPromptConfig
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.training.flat_optimizer import FlatOptimizer
from fedllm_flwr.training.settings import LocalSettings
from strategies.chain import Chain, check_reservoir, checked_part, flat, in_order
from strategies.exchange import ClientReply, by_client, checked_number, messages_for, stream
from strategies.fedlora import server_optimizer
from strategies.figures import training_figures
from strategies.leaks import Leaks
from strategies.observer import Checkpointed
from strategies.prompt_server import PromptServer
from strategies.rounds import RoundStrategy

CONTROLLER = "controller"
OPTIMIZER = "optimizer/"


class FedResPrompt(RoundStrategy):
    """Weighted mean of controllers, or of their gradients (see :class:`RoundStrategy` for the arguments).

    Source:
        The split protocol of esnfed 1.7.1 (``llm_orchestration``): one row an exchange, plain SGD, other start values
        for every client. Here an exchange holds a batch of every client of a node, starts are common, and the modes
        ``sync_sgd`` (as SplitFed-V1, Thapa et al. 2022), ``label_private`` (U-shaped, Vepakomma et al. 2018) and
        ``private_controller`` are ours to choose from.
    """

    def set_up(self) -> None:
        """Build the global model's first state and what checks replies against it."""
        super().set_up()
        config = self.config
        method = config.method
        assert isinstance(method, FedResPromptConfig)  # noqa: S101  # the table of strategies says so
        self.method = method
        task = load_task(config.task.options(config.runtime.data_path), config.rows_seed)
        width = prompt_width(config.model.ref(config.runtime.model_path))
        self.spec = method.controller(task.series_width, width)
        self.reservoir = Reservoir(method.reservoir(config.seed, task.series_width)).fingerprint()
        self.server = PromptServer(config, task, (self.spec.prompt_length, self.spec.width))
        whole = self.spec.start(derive_seed(config.seed, CONTROLLER)).numpy()
        private = method.mode == "private_controller"
        self.controller: np.ndarray = whole[: self.spec.readout_values] if private else whole
        self._optimizer = server_optimizer(config.strategy)
        self._moments: dict[str, np.ndarray] = {}
        self._sum = RunningMean(self.controller.size)
        self._deadline = 0.0
        self._leaks = Leaks(method, config.client)
        self.trained_ids: set[int] = set()

    # What RoundStrategy asks for ---------------------------------------------------------------------------------

    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The controller, or what of it is shared, and this round's learning rate."""
        body = {"learning-rate": self.learning_rate(server_round)} if train else {}
        return body, {CONTROLLER: self.controller}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages that begin the round; all of its exchanges share its deadline."""
        self._deadline = time.monotonic() + self.config.strategy.round_timeout_seconds
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages that ask for the prompts of held-out rows."""
        self._deadline = time.monotonic() + self.config.strategy.round_timeout_seconds
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Sums of the clients, and what their prompts give away."""
        self._leaks.begin_evaluation()
        metrics = super().aggregate_evaluate(server_round, replies)
        for line in self._leaks.lines(server_round):
            self.observer.evaluated(line)
        return metrics and MetricRecord({**metrics, **self._leaks.figures()})

    def trained(self, server_round: int, replies: Iterator[ClientReply]) -> Iterator[ClientReply]:
        """The exchanges of the round; under ``sync_sgd`` with too few clients left all of its steps are undone."""
        for reply in self._exchanged(server_round, self._with_matrix(server_round, replies)):
            self._leaks.trained(reply)
            yield reply

    def _exchanged(
        self, server_round: int, replies: Iterator[ClientReply]
    ) -> Iterator[ClientReply]:
        rate = self.learning_rate(server_round)
        body = {**self._common(server_round), "learning-rate": rate}
        chain = Chain(
            self.config, self.hosting, self.server, body,
            reservoir=self.reservoir, deadline=self._deadline, count=self.observer.count,
        )  # fmt: skip
        if self.method.mode != "sync_sgd":
            private = self.method.mode == "label_private"
            yield from chain.average(replies, label_private=private)
            return
        asked = list(self._left_to_train)
        optimizer, values = self._stepping(rate)

        def step(gradient: np.ndarray) -> np.ndarray:
            optimizer.step(torch.from_numpy(gradient))
            return flat(values.flat.data)

        done = chain.synchronise(replies, self.controller.size, step, self._enough)
        if done is None:
            why = "the round's steps are undone, since too few clients were left"
            yield from (ClientReply(p, {}, {}, f"client {p}: {why}") for p in asked)
            return
        self.controller, self._moments = flat(values.flat.data).copy(), optimizer.state()
        yield from done

    def measured(self, server_round: int, replies: Iterator[ClientReply]) -> Iterator[ClientReply]:
        """Score prompts here; under ``label_private`` send their logits, and the clients score."""
        if self.method.mode != "label_private":
            yield from (self._scored(reply) for reply in replies)
            return
        logits: dict[int, dict[str, np.ndarray]] = {}
        for reply in replies:
            try:
                found = self._logits(reply)
            except (WireError, ShapeError) as error:
                yield ClientReply(reply.partition_id, {}, {}, str(error))
                continue
            logits[reply.partition_id] = {s: flat(values) for s, (values, _) in found.items()}
        yield from self._counted(server_round, logits)

    def begin_sum(self, server_round: int) -> None:
        """Start a new sum."""
        self._sum = RunningMean(self.controller.size)

    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check figures, size and values, then add the controller; a synchronised one is here already."""
        client = f"client {reply.partition_id}"
        figures = training_figures(client, reply.info)
        weight = self.weight_of(reply, figures["num_examples"])
        if self.method.mode != "sync_sgd":
            values = checked_part(reply, CONTROLLER, self.controller.size)
            self._sum.add(values, weight, client=reply.partition_id)
        self.trained_ids.add(reply.partition_id)
        record = {"kind": "client", "round": server_round, "partition_id": reply.partition_id}
        return {**record, **figures}

    def finish_sum(self, server_round: int) -> None:
        """The mean becomes the next controller, through the server optimizer."""
        if self.method.mode == "sync_sgd":
            return
        before = {CONTROLLER: self.controller}
        state = State.from_arrays(self._moments) if self._moments else self._optimizer.init(before)
        means = {CONTROLLER: self._sum.result()}
        state, after = self._optimizer.apply(state, before, means, server_round)
        self.controller, self._moments = after[CONTROLLER], dict(state.arrays())

    def checkpoint(self, server_round: int) -> Checkpointed:
        """The controller, the optimizer's moments, who has trained, and what has been sent."""
        moments = {OPTIMIZER + name: values for name, values in self._moments.items()}
        state = {"trained": sorted(self.trained_ids), "leaks": self._leaks.state()}
        return Checkpointed(server_round, {CONTROLLER: self.controller, **moments}, state)

    def restore(self, saved: Checkpointed) -> None:
        """Go on from a checkpoint.

        Raises:
            ShapeError: The checkpoint holds another controller.
        """
        found = saved.arrays[CONTROLLER]
        if found.size != self.controller.size:
            raise ShapeError(
                f"checkpoint of round {saved.server_round}: expected a controller of {self.controller.size} values, "
                f"got {found.size}"
            )
        self.controller = found
        self.trained_ids = set(saved.state["trained"])
        self._leaks.restore(saved.state["leaks"])
        self._moments = {
            name.removeprefix(OPTIMIZER): values
            for name, values in saved.arrays.items()
            if name.startswith(OPTIMIZER)
        }

    def arrays(self) -> ArrayRecord:
        """The controller as one flat array."""
        return ArrayRecord({CONTROLLER: torch.from_numpy(self.controller)})  # type: ignore[arg-type]

    def _with_matrix(
        self, server_round: int, replies: Iterator[ClientReply]
    ) -> Iterator[ClientReply]:
        """First replies; says so when a client that has trained before comes without its private matrix."""
        for reply in replies:
            lost = reply.info.get("private-matrix") == "new"
            if lost and reply.partition_id in self.trained_ids:
                text = (
                    f"client {reply.partition_id} has lost its private matrix P and begins at the start value; name a "
                    "folder in its node's state-path"
                )
                self.observer.evaluated({"kind": "event", "round": server_round, "text": text})
            yield reply

    # Steps and scores at the server ------------------------------------------------------------------------------

    def _stepping(self, rate: float) -> tuple[FlatOptimizer, Controller]:
        """The clients' own optimizer, here and with its moments kept over rounds."""
        optimizer = self.config.optimizer
        settings = LocalSettings(
            learning_rate=rate,
            optimizer=optimizer.name,
            weight_decay=optimizer.weight_decay,
            momentum=optimizer.momentum,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            clip_norm=self.config.client.clip_norm,
        )
        values = Controller(self.spec, torch.from_numpy(self.controller))
        found = FlatOptimizer(values.flat, settings)
        if self._moments:
            found.load(self._moments)
        return found, values

    def _enough(self, clients: int) -> bool:
        cohort = len(self._round_figures["cohort"])
        return clients > 0 and clients >= self.config.strategy.min_fraction * cohort

    def _logits(self, reply: ClientReply) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By split the logits of a client's held-out rows, and their targets if it sent them.

        Raises:
            WireError: The client has failed, or its prompts are not valid.
        """
        if reply.error:
            raise WireError(reply.error)
        check_reservoir(reply, self.reservoir)
        self._leaks.heard(reply)
        splits: Any = reply.info.get("splits")
        if not isinstance(splits, dict) or set(splits) != set(self.evaluated_splits):
            raise WireError(
                f"client {reply.partition_id}: expected the splits {', '.join(self.evaluated_splits)}, "
                f"got {splits!r:.60}"
            )
        found = {}
        for split in self.evaluated_splits:
            prompts = self.server.checked(reply, split, splits[split])
            [logits] = self.server.logits([prompts])
            found[split] = (logits, prompts.targets)
        return found

    def _scored(self, reply: ClientReply) -> ClientReply:
        """A client's sums, from its prompts and targets."""
        if reply.stray:
            return reply
        client = f"client {reply.partition_id}"
        sums: dict[str, Any] = {}
        try:
            for split, (logits, targets) in self._logits(reply).items():
                assert targets is not None  # noqa: S101  # only label_private keeps them
                losses, _ = cross_entropy(logits, targets)
                facts = reply.info["splits"][split]
                sums[split] = {
                    "correct": int((logits.argmax(1) == targets).sum()),
                    "total": len(targets),
                    "loss_sum": float(losses.double().sum()),
                    "label_tokens": len(targets),
                    "characters": checked_number(client, facts, "characters", whole=True),
                }
        except (WireError, ShapeError) as error:
            return ClientReply(reply.partition_id, {}, {}, str(error))
        return ClientReply(reply.partition_id, {"splits": sums}, {})

    def _counted(
        self, server_round: int, logits: dict[int, dict[str, np.ndarray]]
    ) -> list[ClientReply]:
        """The sums that clients make of their rows' logits."""
        messages = messages_for(
            self.hosting,
            lambda clients: records.instruction(
                {}, {f"{p}/{s}": v for p in clients for s, v in logits[p].items()},
                self.config.wire.downlink,
            ),
            {**self._common(server_round), "splits": list(self.evaluated_splits)},
            message_type=records.SCORE,
            partition_ids=sorted(logits),
            clients_per_wave=self.config.runtime.clients_per_wave,
            server_round=server_round,
        )  # fmt: skip
        left = self._deadline - time.monotonic()
        replies = stream(self.hosting.grid, messages, left, self.observer.count)
        odd: list[ClientReply] = []
        return in_order(by_client(messages, replies), odd) + odd
