"""LoRA clients: adapter values in, local training over the shared frozen backbone, adapter values out."""

from typing import Any

import numpy as np
from flwr.app import Context, Message

from clients.base import (
    Adapted,
    answer_evaluation,
    answer_training,
    attempt,
    beginnings,
    local_settings,
    start_sums,
    training_info,
    weights_of_rows,
)
from clients.outgoing import Trained, encoded_parts
from clients.sift import served, trains_alone
from clients.workspace import Asked, Workspace, read
from fedllm_flwr import records
from fedllm_flwr.averaging import Delta, LoraFactors, rescale, resize
from fedllm_flwr.codecs import decode_difference
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, Side, initial_factors
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedLoraConfig
from fedllm_flwr.settings.unlearning import run_signs
from fedllm_flwr.training.jobs import ClientJob, LocalResult
from fedllm_flwr.training.local import train as train_jobs


def train(message: Message, context: Context) -> Message:
    """Train the clients that this node hosts of the round's cohort, several in one batched pass where that pays.

    One client's failure is its own: it is reported in its place of the reply, and the others are not affected.
    """
    asked = read(message, context)
    work, server_round, side = asked.work, int(asked.body["server-round"]), asked.body["side"]
    delta = _delta(asked)
    begun, infos = beginnings(asked, lambda p: _begin(asked, p, server_round, delta))
    settings = local_settings(work, float(asked.body["learning-rate"]), side)
    head = work.encoder().head_token_ids
    jobs = [job for job, _ in begun.values()]
    results = train_jobs(work.backbone, jobs, settings, head_token_ids=head, delta=delta)
    parts: dict[str, np.ndarray] = {}
    for (job, first), result in zip(begun.values(), results, strict=True):
        info = training_info(result) | first
        if not result.error:
            sent, info["error"] = attempt(
                job.partition_id,
                "encoding its update",
                lambda j=job, r=result: _sent(asked, context, j, r, side),  # type: ignore[misc]
            )
            parts |= {f"{job.partition_id}/{name}": values for name, values in (sent or {}).items()}
        infos[job.partition_id] = info
    return answer_training(asked, message, infos, parts)


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on each client's own held-out rows.

    The adapter is the server's, at its full rank: that is what a run exports, also where clients train lower ranks.
    Without an adapter in the message it is the backbone and the carried delta; a client that is to tune that model
    begins with a fresh adapter, which changes nothing.
    """
    asked = read(message, context)
    work = asked.work
    spec = _method(work).server_spec()
    layout = AdapterLayout(work.shapes, spec.rank)
    adapter = None
    own = {p: served(asked, p) for p in asked.partition_ids}
    if "adapter" in asked.parts:
        adapter = layout.pack(received_factors(asked))
    elif asked.body.get("tune-steps"):
        seed = derive_seed(work.config.seed, "lora_a", 0)
        adapter = layout.pack(initial_factors(work.shapes, spec, seed))
    model = Adapted(adapter, spec if adapter is not None else None, _delta(asked))

    def model_of(partition_id: int) -> Adapted:
        flat = own[partition_id]
        if flat is None:
            return model
        return Adapted(layout.pack(received_factors(asked, flat)), spec, model.delta)

    return answer_evaluation(asked, message, model_of)


def start_factors(asked: Asked, partition_id: int, server_round: int) -> dict[str, LoraFactors]:
    """The adapter that a client begins a round with, at its own rank and scaling.

    Without an adapter in the message it is a fresh seeded draw: A from the round's address, B = 0.
    """
    work = asked.work
    spec = _method(work).spec(partition_id)
    if "adapter" not in asked.parts:
        seed = derive_seed(work.config.seed, "lora_a", server_round)
        return initial_factors(work.shapes, spec, seed)
    return {
        name: rescale(resize(factors, spec.rank), spec.scaling)
        for name, factors in received_factors(asked).items()
    }


def received_factors(asked: Asked, values: np.ndarray | None = None) -> dict[str, LoraFactors]:
    """The server's adapter as it came, or the values that a client is served of it.

    What never changes, and what a message tells only the difference from, is the first adapter, drawn here from the
    run's seed.
    """
    work = asked.work
    server = _method(work).server_spec()
    held: Side = asked.body["side-held"]
    layout = AdapterLayout(work.shapes, server.rank, held)
    flat = asked.parts["adapter"] if values is None else values
    encoded = flat.dtype == np.uint8
    if held == "both" and not encoded:
        return layout.unpack(flat, server.scaling)
    first = initial_factors(work.shapes, server, derive_seed(work.config.seed, "lora_a", 0))
    if encoded:
        codec = work.config.wire.codec("downlink")
        flat = decode_difference(codec, flat, layout.pack(first), layout.shapes)
    return layout.unpack(flat, server.scaling, None if held == "both" else first)


def _begin(
    asked: Asked, partition_id: int, server_round: int, delta: Delta | None
) -> tuple[ClientJob, dict[str, Any]]:
    """What a client is about to train, and what it says of its groups before."""
    job = _job(asked, partition_id, server_round)
    return job, start_sums(asked, partition_id, Adapted(job.adapter, job.spec, delta))


def _job(asked: Asked, partition_id: int, server_round: int) -> ClientJob:
    work = asked.work
    spec = _method(work).spec(partition_id)
    start = start_factors(asked, partition_id, server_round)
    return ClientJob(
        partition_id=partition_id,
        rows=work.encoded(partition_id, "train"),
        adapter=AdapterLayout(work.shapes, spec.rank).pack(start),
        signs=_signs(work, spec, start),
        spec=spec,
        seed=derive_seed(work.config.seed, "client", partition_id, server_round),
        row_weights=weights_of_rows(asked, partition_id),
    )


def _signs(work: Workspace, spec: LoraSpec, start: dict[str, LoraFactors]) -> np.ndarray | None:
    """Signs of B in the places of a whole adapter's values; those of A, which is not trained, are not looked at."""
    if not trains_alone(work.config):
        return None
    layout = AdapterLayout(work.shapes, spec.rank, "b")
    signs = run_signs(work.config.seed, layout.size).astype(np.float32)
    return AdapterLayout(work.shapes, spec.rank).pack(layout.unpack(signs, spec.scaling, start))


def _delta(asked: Asked) -> Delta | None:
    """The carried delta; nobody knows it before, so a codec of differences carries it as that from zeros."""
    if "delta" not in asked.parts:
        return None
    flat, ranks = asked.parts["delta"], asked.body["delta-ranks"]
    if flat.dtype == np.uint8:
        size = records.delta_size(ranks, asked.work.shapes)
        flat = asked.work.config.wire.codec("downlink").decode(flat, ((size,),))
    return records.unpack_delta(flat, ranks, asked.work.shapes)


def _sent(
    asked: Asked, context: Context, job: ClientJob, result: LocalResult, side: Side
) -> dict[str, np.ndarray]:
    """A client's trained side as it travels; each side has a residual of its own."""
    work = asked.work
    spec = _method(work).spec(job.partition_id)
    trained = Trained(
        values=_one_side(work, spec, result.adapter, side),
        received=_one_side(work, spec, job.adapter, side),
        shapes=AdapterLayout(work.shapes, spec.rank, side).shapes,
    )
    return encoded_parts(asked, context, job.partition_id, {"adapter": trained}, side)


def _one_side(work: Workspace, spec: LoraSpec, flat: np.ndarray, side: Side) -> np.ndarray:
    """The trained side of a whole adapter; the other side is the server's own and stays off the wire."""
    if side == "both":
        return flat
    factors = AdapterLayout(work.shapes, spec.rank).unpack(flat, spec.scaling)
    return AdapterLayout(work.shapes, spec.rank, side).pack(factors)


def _method(work: Workspace) -> FedLoraConfig:
    method = work.config.method
    assert isinstance(method, FedLoraConfig)  # noqa: S101  # the table of clients says so
    return method
