"""The exchanges of one round of FedResPrompt, from the first prompts to what closes the round.

The server computes for the prompts of all clients together, in the order of partition ids, whatever node sent them. So
the result does not depend on hosting. A client whose answer is missing or not valid leaves the round, by name.

Axes: B rows of one client, m tokens of a prompt, d width of the model's embeddings, K label words.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedllm_flwr import records
from fedllm_flwr.averaging import RunningMean
from fedllm_flwr.averaging.checks import check_values
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ShapeError, WireError
from strategies.exchange import ClientReply, by_client, messages_for, stream
from strategies.hosting import Hosting
from strategies.prompt_server import Prompts, PromptServer

Parts = Mapping[str, np.ndarray]


class Chain:
    """One round's exchanges.

    Args:
        config: The run.
        hosting: Which node hosts which client, and the transport.
        server: The model.
        body: What every message of the round says.
        reservoir: The fingerprint that every client's reservoir must have.
        deadline: Of the round, on the monotonic clock.
        count: The byte ledger.
    """

    def __init__(
        self,
        config: RunConfig,
        hosting: Hosting,
        server: PromptServer,
        body: Mapping[str, Any],
        *,
        reservoir: str,
        deadline: float,
        count: Callable[[str, str, Message], None],
    ) -> None:
        self._config, self._hosting, self._server = config, hosting, server
        self._body, self._reservoir = dict(body), reservoir
        self._deadline, self._count = deadline, count
        self._exchange = self._size = 0
        self._losses: dict[int, tuple[float, int]] = {}
        self._closed: list[ClientReply] = []

    def average(self, replies: Iterable[ClientReply], *, label_private: bool) -> list[ClientReply]:
        """Let every client train its own controller on gradients of its prompts.

        Args:
            replies: The first prompts.
            label_private: Whether clients make the slopes of their losses themselves, from logits.

        Returns:
            In the order of partition ids the replies with the controllers, and those of clients that left.
        """
        waiting = self._prompts(replies)
        while waiting:
            make = self._gradients_of_slopes if label_private else self._gradients
            down = make(waiting)
            waiting = self._prompts(self._ask("gradient", down)) if down else []
        return self._result()

    def synchronise(
        self,
        replies: Iterable[ClientReply],
        size: int,
        step: Callable[[np.ndarray], np.ndarray],
        enough: Callable[[int], bool],
    ) -> list[ClientReply] | None:
        """Average the clients' gradients in each step, and make the step here.

        The mean weighs each client by its rows in the step, so it is the gradient of all clients' rows together.

        Args:
            replies: The first prompts.
            size: Values of a controller.
            step: From the mean gradient to the next controller.
            enough: Whether so many clients are enough to go on.

        Returns:
            As :meth:`average`, without controllers; None if too few clients were left to go on.
        """
        waiting, self._size = self._prompts(replies), size
        while waiting:
            if not enough(len(waiting) + self._finished):
                return None
            mean, goes_on = RunningMean(size), []
            rows = {own.partition_id: len(own.values) for own in waiting}
            for reply in self._ask("gradient", self._gradients(waiting)):
                more = self._added(reply, mean, rows[reply.partition_id])
                goes_on += [reply.partition_id] if more else []
            if not mean.count or not enough(len(goes_on) + self._finished):
                return None
            controller = step(mean.result())
            waiting = []
            if goes_on:
                nothing: dict[int, Parts] = {p: {} for p in goes_on}
                waiting = self._prompts(
                    self._ask("controller", nothing, {"controller": controller})
                )
        return self._result() if enough(self._finished) else None

    @property
    def _finished(self) -> int:
        """Clients that have done all of their steps."""
        return sum(not reply.error for reply in self._closed)

    def _result(self) -> list[ClientReply]:
        return sorted(self._closed, key=lambda reply: reply.partition_id)

    def _prompts(self, replies: Iterable[ClientReply]) -> list[Prompts]:
        """The clients that have sent prompts, checked; all others are done or leave."""
        found = []
        for reply in replies:
            if reply.error or reply.stray:
                self._closed.append(reply)
            elif "controller" in reply.parts:
                self._close(reply)
            else:
                try:
                    if self._exchange == 0:
                        check_reservoir(reply, self._reservoir)
                    found.append(self._server.checked(reply, "prompts", reply.info, least=1))
                except WireError as error:
                    self._leave(reply.partition_id, str(error))
        return found

    def _gradients(self, waiting: Sequence[Prompts]) -> dict[int, Parts]:
        """Of the losses of what clients have sent; the losses are kept for the records."""
        down: dict[int, Parts] = {}
        found = self._server.losses_and_gradients(waiting)
        for own, (losses, gradients) in zip(waiting, found, strict=True):
            before, rows = self._losses.get(own.partition_id, (0.0, 0))
            total = before + float(losses.double().sum())
            self._losses[own.partition_id] = (total, rows + len(losses))
            down[own.partition_id] = {"gradient": flat(gradients)}
        return down

    def _gradients_of_slopes(self, waiting: Sequence[Prompts]) -> dict[int, Parts]:
        """Logits down, slopes up, and the gradients that follow: the server sees no target and no loss."""
        logits = self._server.logits(waiting)
        down = {
            own.partition_id: {"logits": flat(values)}
            for own, values in zip(waiting, logits, strict=True)
        }
        sent = {own.partition_id: own for own in waiting}
        slopes: dict[int, Tensor] = {}
        for reply in self._ask("logits", down):
            shape = (len(sent[reply.partition_id].values), self._server.num_classes)
            try:
                values = checked_part(reply, "slope", shape[0] * shape[1])
            except (WireError, ShapeError) as error:
                self._leave(reply.partition_id, str(error))
                continue
            slopes[reply.partition_id] = torch.from_numpy(values.copy()).view(shape)
        if not slopes:
            return {}
        kept = [sent[p] for p in slopes]
        found = self._server.gradients(kept, list(slopes.values()))
        return {own.partition_id: {"gradient": flat(g)} for own, g in zip(kept, found, strict=True)}

    def _added(self, reply: ClientReply, mean: RunningMean, rows: int) -> bool:
        """Add a client's gradient to a step's mean; whether the client has another step."""
        try:
            values = checked_part(reply, "controller-gradient", self._size)
            mean.add(values, rows, client=reply.partition_id)
        except (WireError, ShapeError) as error:
            self._leave(reply.partition_id, str(error))
            return False
        if "steps" in reply.info:
            self._close(reply)
            return False
        return True

    def _close(self, reply: ClientReply) -> None:
        """A client is done. Its loss is what the server has seen, where it has seen any."""
        info = dict(reply.info)
        if reply.partition_id in self._losses:
            total, rows = self._losses[reply.partition_id]
            info["loss"] = total / rows
        self._closed.append(ClientReply(reply.partition_id, info, reply.parts))

    def _leave(self, partition_id: int, error: str) -> None:
        self._closed.append(ClientReply(partition_id, {}, {}, error))

    def _ask(
        self, stage: str, down: Mapping[int, Parts], shared: Parts | None = None
    ) -> list[ClientReply]:
        """One exchange: every client's own parts, and what all get, to its node; answers by client, in order."""
        self._exchange += 1

        def content(partition_ids: Sequence[int]) -> RecordDict:
            parts = {f"{p}/{name}": v for p in partition_ids for name, v in down[p].items()}
            whole = {**(shared or {}), **parts}
            return records.instruction({}, whole, self._config.wire.downlink)

        messages = messages_for(
            self._hosting,
            content,
            {**self._body, "stage": stage, "exchange": self._exchange},
            message_type=records.EXCHANGE,
            partition_ids=sorted(down),
            clients_per_wave=self._config.runtime.clients_per_wave,
            server_round=int(self._body["server-round"]),
        )
        left = self._deadline - time.monotonic()
        replies = by_client(messages, stream(self._hosting.grid, messages, left, self._count))
        return in_order(replies, self._closed)


def in_order(replies: Iterable[ClientReply], odd: list[ClientReply]) -> list[ClientReply]:
    """Replies by partition id; those that nobody asked for are put with the odd ones."""
    found: list[ClientReply] = []
    for reply in replies:
        (odd if reply.stray else found).append(reply)
    return sorted(found, key=lambda reply: reply.partition_id)


def check_reservoir(reply: ClientReply, expected: str) -> None:
    """Refuse a client whose reservoir is another one: its controller means something else.

    Raises:
        WireError: Names the client and both fingerprints.
    """
    found: Any = reply.info.get("reservoir")
    if found != expected:
        raise WireError(
            f"client {reply.partition_id}: expected reservoir {expected}, got {found!r:.40}"
        )


def checked_part(reply: ClientReply, name: str, size: int) -> np.ndarray:
    """One finite part of a client's answer.

    Args:
        reply: The answer.
        name: The part.
        size: Its values.

    Raises:
        WireError: The client has failed, or the part is absent or not finite.
        ShapeError: It has another size.
    """
    client = f"client {reply.partition_id}"
    if reply.error:
        raise WireError(reply.error)
    if set(reply.parts) != {name}:
        raise WireError(f"{client}: expected the parts {[name]}, got {sorted(reply.parts)}")
    values = reply.parts[name]
    if values.size != size:
        raise ShapeError(f"{client}, part {name}: expected {size} values, got {values.size}")
    check_values(values, f"{client}, part {name}")
    return values


def flat(values: Tensor) -> np.ndarray:
    """A tensor as it crosses the wire."""
    found: np.ndarray = values.detach().float().cpu().numpy().ravel()
    return found
