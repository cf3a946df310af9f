"""A client that wants to be forgotten asks a model about its own rows, and tells figures.

Of a row nothing crosses the wire but how the model scores it: losses, Min-K%++ scores, how likely a canary's code is.
That is more than the sums of an evaluation, so a node answers only for clients that have asked to be forgotten, which
its operator says (node config ``forget``, or an environment variable).
"""

import os
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Context, Message

from clients.base import attempt
from clients.questions import Questions
from clients.workspace import Asked, read
from fedllm_flwr import records
from fedllm_flwr.errors import WireError
from fedllm_flwr.settings.runtime import FORGET_VARIABLE
from fedllm_flwr.tiers import unpack_adaptation
from fedllm_flwr.unlearning.questions import Plan, queries

MODEL = "model"
"""The part of the message that holds what a run has added to the frozen model."""

UNFIT = "it does not fit at the client"
"""In place of a reason, which might quote what only the client knows."""


def examine(message: Message, context: Context) -> Message:
    """For each asked client: what it has to ask with, or, with a plan in the message, what the model says."""
    asked = read(message, context)
    infos: list[dict[str, Any]] = []
    parts: dict[str, np.ndarray] = {}
    for partition_id in asked.partition_ids:
        found, reason = attempt(
            partition_id,
            "examination",
            lambda p=partition_id: _examined(asked, context, p),  # type: ignore[misc]
        )
        info, said = found or ({"error": reason}, {})
        infos.append({"partition-id": partition_id, **info})
        parts |= {f"{partition_id}/{name}": values for name, values in said.items()}
    return Message(records.answer({"clients": infos}, parts, "float32", 0), reply_to=message)


def _examined(
    asked: Asked, context: Context, client: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What one client tells, and figures by name."""
    leaving = str(context.node_config.get("forget", os.environ.get(FORGET_VARIABLE, "")))
    if str(client) not in [each.strip() for each in leaving.split(",")]:
        raise WireError(
            f"client {client}: expected one that has asked to be forgotten (node config forget), got another"
        )
    work, body = asked.work, asked.body
    questions = Questions(work, client)
    material = questions.material
    if body["plan"] is None:
        told = asdict(material) | {"unfit": dict.fromkeys(material.unfit, UNFIT)}
        return {"material": told}, {}
    plan = Plan(**body["plan"])
    ref = work.config.model.ref(work.config.runtime.model_path)
    model = unpack_adaptation(body[MODEL], asked.parts, MODEL, ref)
    said = questions.ask(model, plan, refuses=bool(body["refuses"]))
    figures = {name: values.astype(np.float32) for name, values in said.items()}
    return {"queries": queries(plan, material)}, figures
