"""FedResPrompt clients: a row's reservoir state becomes a soft prompt, which goes to the server's frozen model.

A round is a chain of exchanges. The first message brings the controller and takes away the prompts of the first step;
then each one brings something for the prompts that are out, and takes away the next ones, or in the end what the
server merges. What happens at each stage of each mode:

    train                 controller down; prompts of step 0 up
    exchange, gradient    gradient down; the controller steps; next prompts up, or at the end the controller
                          (``sync_sgd``: the controller's gradient up, no step)
    exchange, controller  ``sync_sgd`` only: the stepped controller down; next prompts up
    exchange, logits      ``label_private`` only: logits down; their slopes up
    evaluate              controller down; prompts of held-out rows up, and what prompts give away (`clients.leaks`)
    score                 ``label_private`` only: their logits down; counts up

With prompts go their rows' targets, except under ``label_private``, and with ``server_text`` their rows' tokens.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor

from clients.base import attempt, local_settings
from clients.contexts import Contexts, contexts_of, method_of
from clients.guard import guarded, slope_before_clip
from clients.leaks import leaks
from clients.personal import PersonalStore
from clients.session import Session, close_session, open_session
from clients.workspace import Asked, Workspace, read
from fedllm_flwr import records
from fedllm_flwr.errors import WireError
from fedllm_flwr.reservoir import Controller, cross_entropy
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.training.batches import plan_steps
from fedllm_flwr.training.flat_optimizer import FlatOptimizer

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]
"""What a client says, and its parts."""


def train(message: Message, context: Context) -> Message:
    """Begin the round of the clients that this node hosts of its cohort."""
    asked = read(message, context)
    return _answered(asked, message, lambda p: _Turn(asked, context, p, begins=True).began())


def exchange(message: Message, context: Context) -> Message:
    """Go on with the round: the next exchange of every client that the message names."""
    asked = read(message, context)
    stage = str(asked.body["stage"])

    def next_answer(partition_id: int) -> Answer:
        turn = _Turn(asked, context, partition_id, begins=False)
        stages = {"gradient": turn.learned, "controller": turn.updated, "logits": turn.compared}
        if stage not in stages:
            raise WireError(f"stage: expected one of {sorted(stages)}, got {stage!r}")
        return stages[stage]()

    return _answered(asked, message, next_answer)


def evaluate(message: Message, context: Context) -> Message:
    """Prompts of the held-out rows; the server scores them."""
    asked = read(message, context)
    after = int(asked.body["server-round"]) + 1

    def prompts(partition_id: int) -> Answer:
        work = asked.work
        contexts = contexts_of(work)
        values = _whole_controller(asked, context, partition_id, before_round=after)
        controller = Controller(contexts.spec, torch.from_numpy(values))
        info: dict[str, Any] = {"splits": {}, "reservoir": contexts.reservoir.fingerprint()}
        sent = {}
        for split in asked.body["splits"]:
            rows = getattr(work.rows(partition_id), split)
            states = contexts.states(partition_id, split)
            sent[split] = guarded(method_of(work), controller.prompts(states)[1])
            characters = sum(len(row.target) for row in rows)
            info["splits"][split] = _facts(work, rows) | {"characters": characters}
        info |= leaks(method_of(work), contexts, partition_id, controller, sent)
        return info, {split: prompts.numpy().ravel() for split, prompts in sent.items()}

    return _answered(asked, message, prompts)


def score(message: Message, context: Context) -> Message:
    """Hold the logits of the held-out rows' prompts against targets that stay here."""
    asked = read(message, context)

    def sums(partition_id: int) -> Answer:
        work, found = asked.work, {}
        for split in asked.body["splits"]:
            rows = getattr(work.rows(partition_id), split)
            logits = _part(asked, partition_id, split, (len(rows), len(work.task.label_words)))
            targets = _targets(rows)
            losses, _ = cross_entropy(logits, targets)
            found[split] = {
                "correct": int((logits.argmax(1) == targets).sum()),
                "total": len(rows),
                "loss_sum": float(losses.double().sum()),
                "label_tokens": len(rows),
                "characters": sum(len(row.target) for row in rows),
            }
        return {"splits": found}, {}

    return _answered(asked, message, sums)


class _Turn:
    """One client's part of one training message."""

    def __init__(self, asked: Asked, context: Context, partition_id: int, *, begins: bool) -> None:
        self._began = time.process_time()
        self._asked, self._context, self._client = asked, context, partition_id
        self._work, self._method = asked.work, method_of(asked.work)
        self._contexts: Contexts = contexts_of(self._work)
        self._rows = self._work.rows(partition_id).train
        server_round = int(asked.body["server-round"])
        if begins:
            close_session(context, partition_id)
            values = _whole_controller(asked, context, partition_id, before_round=server_round)
            self._session = Session(partition_id, _run(asked), server_round, values)
        else:
            self._session = open_session(
                context, partition_id, _run(asked), server_round, int(asked.body["exchange"])
            )
            self._session.exchange += 1
        self._settings = local_settings(self._work, float(asked.body["learning-rate"]))
        self._controller = Controller(
            self._contexts.spec, torch.from_numpy(self._session.controller)
        )
        seed = derive_seed(self._work.config.seed, "client", partition_id, server_round)
        planned = plan_steps(len(self._rows), self._settings, seed)
        self._plan = [np.concatenate(step) for step in planned]

    def began(self) -> Answer:
        """The first prompts, with the reservoir's fingerprint: clients of unequal reservoirs must not be averaged.

        A client with a private matrix says whether it is its own, or the start value since it has none.
        """
        info, parts = self._prompts()
        info["reservoir"] = self._contexts.reservoir.fingerprint()
        if self._method.mode == "private_controller":
            store, server_round = _store(self._context, self._asked), self._session.server_round
            known = store.load(self._client, server_round) is not None
            info["private-matrix"] = "kept" if known else "new"
        return info, parts

    def learned(self) -> Answer:
        """Take the gradient of the prompts that are out."""
        z = self._states()
        b, prompts = self._controller.prompts(z)
        slope = slope_before_clip(self._method, prompts, self._down("gradient", prompts))
        session = self._session
        session.step += 1
        session.rows_done += len(z)
        if self._method.mode == "sync_sgd":
            gradient = self._controller.gradient(z, b, slope).numpy()
            info = {"rows": len(z)} | ({} if self._has_step else self._figures())
            return self._closed(info, {"controller-gradient": gradient}, goes_on=self._has_step)
        optimizer = FlatOptimizer(self._controller.flat, self._settings)
        optimizer.load(session.moments)
        for _ in range(self._method.micro_steps):
            b, _ = self._controller.prompts(z)
            optimizer.step(self._controller.gradient(z, b, slope))
        session.controller, session.moments = self._controller.flat.data.numpy(), optimizer.state()
        return self._prompts() if self._has_step else self._finished()

    def updated(self) -> Answer:
        """Go on from the server's step."""
        self._session.controller = _shared(self._asked, self._contexts.spec.size)
        self._controller.load(torch.from_numpy(self._session.controller))
        return self._prompts()

    def compared(self) -> Answer:
        """Turn logits into slopes; the targets stay here."""
        chosen = [self._rows[i] for i in self._plan[self._session.step]]
        shape = (len(chosen), len(self._work.task.label_words))
        logits = _part(self._asked, self._client, "logits", shape)
        losses, slopes = cross_entropy(logits, _targets(chosen))
        self._session.loss_sum += float(losses.double().sum())
        return self._closed({"rows": len(chosen)}, {"slope": slopes.numpy().ravel()}, goes_on=True)

    @property
    def _has_step(self) -> bool:
        return self._session.step < len(self._plan)

    def _states(self) -> Tensor:
        """Of the rows whose prompts are out."""
        chosen = torch.from_numpy(self._plan[self._session.step])
        return self._contexts.states(self._client, "train")[chosen]

    def _prompts(self) -> Answer:
        chosen = [self._rows[i] for i in self._plan[self._session.step]]
        prompts = guarded(self._method, self._controller.prompts(self._states())[1])
        parts = {"prompts": prompts.numpy().ravel()}
        return self._closed(_facts(self._work, chosen), parts, goes_on=True)

    def _finished(self) -> Answer:
        """What the server merges; P stays where it is private."""
        values = self._session.controller
        if self._method.mode == "private_controller":
            shared = self._contexts.spec.readout_values
            store = _store(self._context, self._asked)
            store.save(self._client, self._session.server_round, values[shared:])
            values = values[:shared]
        return self._closed(self._figures(), {"controller": values}, goes_on=False)

    def _figures(self) -> dict[str, Any]:
        session = self._session
        knows = self._method.mode == "label_private"
        return {
            "num-examples": len(self._rows),
            "steps": session.step,
            "tokens": session.rows_done * self._method.length,
            "cpu-seconds": session.cpu_seconds + time.process_time() - self._began,
            **({"loss": session.loss_sum / session.rows_done} if knows else {}),
        }

    def _down(self, name: str, like: Tensor) -> Tensor:
        return _part(self._asked, self._client, name, tuple(like.shape))

    def _closed(
        self, info: dict[str, Any], parts: dict[str, np.ndarray], *, goes_on: bool
    ) -> Answer:
        if goes_on:
            self._session.cpu_seconds += time.process_time() - self._began
            self._session.save(self._context)
        else:
            close_session(self._context, self._client)
        return info, parts


def _answered(asked: Asked, message: Message, answer: Callable[[int], Answer]) -> Message:
    """Every client's answer; one client's failure is its own."""
    infos: list[dict[str, Any]] = []
    parts: dict[str, np.ndarray] = {}
    for partition_id in asked.partition_ids:
        found, reason = attempt(partition_id, "exchange", lambda p=partition_id: answer(p))  # type: ignore[misc]
        if found is None:
            infos.append({"partition-id": partition_id, "error": reason})
            continue
        info, own = found
        infos.append({"partition-id": partition_id, "error": "", **info})
        parts |= {f"{partition_id}/{name}": values for name, values in own.items()}
    codec = asked.work.config.wire.uplink
    rows = sum(int(info.get("rows", 0)) for info in infos)
    return Message(records.answer({"clients": infos}, parts, codec, rows), reply_to=message)


def _facts(work: Workspace, rows: tuple[Row, ...] | list[Row]) -> dict[str, Any]:
    """What goes with the prompts of rows."""
    method = method_of(work)
    facts: dict[str, Any] = {"rows": len(rows)}
    if method.mode != "label_private":
        facts["targets"] = _targets(rows).tolist()
    if method.server_text != "none":
        facts["texts"] = [row.input_ids.tolist() for row in work.encoder().encode(rows)]
    return facts


def _targets(rows: tuple[Row, ...] | list[Row]) -> Tensor:
    return torch.tensor([row.label for row in rows], dtype=torch.int64)


def _part(asked: Asked, partition_id: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """One client's part of a message.

    Raises:
        WireError: It is absent or of another size.
    """
    values = asked.parts.get(f"{partition_id}/{name}", np.empty(0, dtype=np.float32))
    if values.size != int(np.prod(shape)):
        raise WireError(
            f"client {partition_id}, part {name}: expected {list(shape)} values, got {values.size}"
        )
    return torch.from_numpy(values.copy()).view(shape)


def _shared(asked: Asked, size: int) -> np.ndarray:
    """The controller, or what of it is shared, from a message."""
    values = asked.parts.get("controller", np.empty(0, dtype=np.float32))
    if values.size != size:
        raise WireError(f"part controller: expected {size} values, got {values.size}")
    return values.copy()


def _whole_controller(
    asked: Asked, context: Context, partition_id: int, *, before_round: int
) -> np.ndarray:
    """The controller that a client goes on from: the server's, with P from its own store where that is private.

    P begins at the start value that the run's seed gives, so that averaging W_out has a meaning.
    """
    spec = contexts_of(asked.work).spec
    if method_of(asked.work).mode != "private_controller":
        return _shared(asked, spec.size)
    readout = _shared(asked, spec.readout_values)
    own = _store(context, asked).load(partition_id, before_round)
    if own is None:
        start = spec.start(derive_seed(asked.work.config.seed, "controller"))
        own = start.numpy()[spec.readout_values :]
    return np.concatenate([readout, own])


def _store(context: Context, asked: Asked) -> PersonalStore:
    return PersonalStore(context, _run(asked), asked.work.config.keep_checkpoints + 1)


def _run(asked: Asked) -> str:
    return str(asked.body.get("run", ""))
