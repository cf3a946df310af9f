"""Full-weight clients: the rows that a run has changed come in, a client's changes of some rows go out.

A client keeps nothing between messages, so every message brings all rows that were changed so far. Where the server
picks the rows, a round may take two messages:

    train, stage norms     changed rows down; squared norms of the gradient's rows of a first batch up
    exchange, stage train  changed rows and the chosen ones' places down; their changes up

In all other rounds the first message has the stage ``train`` already.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Context, Message

from clients.base import Adapted, answer_evaluation, attempt, local_settings
from clients.outgoing import Trained, encoded_parts
from clients.workspace import Asked, Workspace, read
from fedllm_flwr import records
from fedllm_flwr.errors import WireError
from fedllm_flwr.grass.packing import bitmap, indices_of, pack, scales_of, unpack
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import Rows
from fedllm_flwr.models.shapes import LayerShape, layer_shapes
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.grass import FedGrassConfig
from fedllm_flwr.training.batches import plan_steps
from fedllm_flwr.training.full import labelled_rows, row_norms, train_full
from fedllm_flwr.training.full_job import FullJob, FullResult, FullSettings
from fedllm_flwr.training.full_layers import updates_active

STATE, ROWS, NORMS = "state", "rows", "norms"
"""Parts of messages: rows changed so far, a client's changes, and its norms."""

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]
"""What a client says, and its parts."""


def train(message: Message, context: Context) -> Message:
    """Train the clients that this node hosts of the round's cohort one by one, or take their norms.

    One client's failure is its own: it is reported in its place of the reply, and the others are not affected.
    """
    asked = read(message, context)
    stages = {NORMS: _norms, "train": _trained}
    stage = str(asked.body["stage"])
    if stage not in stages:
        raise WireError(f"stage: expected one of {sorted(stages)}, got {stage!r}")
    start = _changed(asked)
    infos: list[dict[str, Any]] = []
    parts: dict[str, np.ndarray] = {}
    for partition_id in asked.partition_ids:
        found, reason = attempt(
            partition_id,
            f"its {stage} stage",
            lambda p=partition_id: stages[stage](asked, context, p, start),  # type: ignore[misc]
        )
        info, own = found or (
            {"partition-id": partition_id, "num-examples": 0, "error": reason},
            {},
        )
        infos.append(info)
        parts |= {f"{partition_id}/{name}": values for name, values in own.items()}
    # Squared norms span more powers of ten than half precision has
    codec = "float32" if stage == NORMS else asked.work.config.wire.uplink
    counted = sum(info["num-examples"] for info in infos)
    return Message(records.answer({"clients": infos}, parts, codec, counted), reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the backbone under the rows that were changed, on each client's own held-out rows."""
    asked = read(message, context)
    with updates_active(asked.work.backbone, _changed(asked)):
        return answer_evaluation(asked, message, lambda _: Adapted(None, None))


def _norms(
    asked: Asked, context: Context, partition_id: int, start: Mapping[str, RowUpdate]
) -> Answer:
    """What the rule reads of the gradient of the first micro-batch that the client will train on.

    Raises:
        DataError: No row has label tokens.
    """
    work = asked.work
    method = _method(work)
    rows = labelled_rows(work.encoded(partition_id, "train"))
    plan = plan_steps(len(rows), _settings(asked).local, _seed(asked, partition_id))
    found = row_norms(
        work.backbone,
        [rows[i] for i in next(plan)[0]],
        method.target_modules,
        rule=method.rule,
        start=start,
        head_token_ids=work.encoder().head_token_ids,
    )
    flat = np.concatenate([found[name] for name in sorted(found)]).astype(np.float32)
    return {"partition-id": partition_id, "num-examples": len(rows)}, {NORMS: flat}


def _trained(
    asked: Asked, context: Context, partition_id: int, start: Mapping[str, RowUpdate]
) -> Answer:
    """What the client's rows have changed by, as it may leave, and which they are where it picked them."""
    work = asked.work
    method = _method(work)
    job = FullJob(
        partition_id=partition_id,
        rows=work.encoded(partition_id, "train"),
        target_modules=method.target_modules,
        seed=_seed(asked, partition_id),
        start=start,
        shared_rows=_chosen(asked) if method.picks_at_server else None,
    )
    head = work.encoder().head_token_ids
    result = train_full(work.backbone, job, _settings(asked), head_token_ids=head)
    info = _info(result)
    if result.error:
        return info, {}
    if method.picks_at_clients:
        heights = {name: shape.out_features for name, shape in _shapes(work).items()}
        info["rows"] = {n: bitmap(u.indices, heights[n]) for n, u in result.updates.items()}
    values = pack(result.updates)
    shapes = [update.values.shape for _, update in sorted(result.updates.items())]
    changed = Trained(values=values, received=np.zeros_like(values), shapes=shapes)
    return info, encoded_parts(asked, context, partition_id, {ROWS: changed})


def _info(result: FullResult) -> dict[str, Any]:
    return {
        "partition-id": result.partition_id,
        "num-examples": result.num_examples,
        "loss": result.loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "cpu-seconds": result.cpu_seconds,
        "error": result.error,
    }


def _changed(asked: Asked) -> dict[str, RowUpdate]:
    """All rows that the run has changed so far, as they came; none in a message about the plain model."""
    if STATE not in asked.parts:
        return {}
    shapes, places = _shapes(asked.work), asked.body["changed"]
    indices = {
        name: indices_of(text, shapes[name].out_features, f"changed rows, layer {name}")
        for name, text in places.items()
    }
    columns = {name: shape.in_features for name, shape in shapes.items()}
    values = asked.parts[STATE]
    if values.dtype == np.uint8:
        sizes = [(len(indices[name]), columns[name]) for name in sorted(indices)]
        values = asked.work.config.wire.codec("downlink").decode(values, sizes)
    return unpack(values, indices, columns)


def _chosen(asked: Asked) -> dict[str, Rows]:
    """The rows that the server has picked."""
    shapes, scales = _shapes(asked.work), asked.body["scales"]
    found = {}
    for name, text in asked.body["rows"].items():
        indices = indices_of(text, shapes[name].out_features, f"chosen rows, layer {name}")
        plain = np.ones(len(indices), np.float32)
        found[name] = Rows(indices, scales_of(scales[name]) if name in scales else plain)
    return found


def _seed(asked: Asked, partition_id: int) -> int:
    config, server_round = asked.work.config, int(asked.body["server-round"])
    return derive_seed(config.seed, "client", partition_id, server_round)


def _settings(asked: Asked) -> FullSettings:
    method = _method(asked.work)
    return FullSettings(
        local=local_settings(asked.work, float(asked.body["learning-rate"])),
        projection=method.projection(),
        eight_bit=method.eight_bit,
        checkpointing=method.checkpointing,
    )


def _shapes(work: Workspace) -> dict[str, LayerShape]:
    found = layer_shapes(work.backbone.ref, _method(work).target_modules)
    return {shape.name: shape for shape in found}


def _method(work: Workspace) -> FedGrassConfig:
    method = work.config.method
    assert isinstance(method, FedGrassConfig)  # noqa: S101  # the table of clients says so
    return method
