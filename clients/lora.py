"""LoRA clients: adapter values in, local training over the shared frozen backbone, adapter values out."""

import numpy as np
from flwr.app import Context, Message

from clients.base import (
    Adapted,
    answer_evaluation,
    local_settings,
    start_sums,
    training_info,
    weights_of_rows,
)
from clients.workspace import Asked, Workspace, read
from fedllm_flwr import records
from fedllm_flwr.averaging import Delta, LoraFactors, rescale, resize
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, Side, initial_factors
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedLoraConfig
from fedllm_flwr.training.local import ClientJob
from fedllm_flwr.training.local import train as train_jobs


def train(message: Message, context: Context) -> Message:
    """Train the clients that this node hosts of the round's cohort, several in one batched pass where that pays.

    One client's failure is its own: it is reported in its place of the reply, and the others are not affected.
    """
    asked = read(message, context)
    work, server_round, side = asked.work, int(asked.body["server-round"]), asked.body["side"]
    delta = _delta(asked)
    jobs = [_job(asked, partition_id, server_round) for partition_id in asked.partition_ids]
    firsts = [
        start_sums(asked, job.partition_id, Adapted(job.adapter, job.spec, delta)) for job in jobs
    ]
    settings = local_settings(work, float(asked.body["learning-rate"]), side)
    head = work.encoder().head_token_ids
    results = train_jobs(work.backbone, jobs, settings, head_token_ids=head, delta=delta)
    infos, parts = [], {}
    for job, result, first in zip(jobs, results, firsts, strict=True):
        infos.append(training_info(result) | first)
        if not result.error:
            spec = _method(work).spec(max(job.partition_id, 0))
            parts[f"{result.partition_id}/adapter"] = _one_side(work, spec, result.adapter, side)
    trained = sum(info["num-examples"] for info in infos)
    return Message(
        records.answer({"clients": infos}, parts, work.config.wire.uplink, trained),
        reply_to=message,
    )


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
    if "adapter" in asked.parts:
        adapter = layout.pack(received_factors(asked))
    elif asked.body.get("tune-steps"):
        seed = derive_seed(work.config.seed, "lora_a", 0)
        adapter = layout.pack(initial_factors(work.shapes, spec, seed))
    model = Adapted(adapter, spec if adapter is not None else None, _delta(asked))
    return answer_evaluation(asked, message, lambda _: model)


def start_factors(asked: Asked, partition_id: int, server_round: int) -> dict[str, LoraFactors]:
    """The adapter that a client begins a round with, at its own rank and scaling.

    Without an adapter in the message it is a fresh seeded draw: A from the round's address, B = 0.
    """
    work = asked.work
    spec = _method(work).spec(max(partition_id, 0))
    if "adapter" not in asked.parts:
        seed = derive_seed(work.config.seed, "lora_a", server_round)
        return initial_factors(work.shapes, spec, seed)
    return {
        name: rescale(resize(factors, spec.rank), spec.scaling)
        for name, factors in received_factors(asked).items()
    }


def received_factors(asked: Asked) -> dict[str, LoraFactors]:
    """The server's adapter as it came; a side that never changes is drawn here from the run's seed."""
    work = asked.work
    server = _method(work).server_spec()
    held: Side = asked.body["side-held"]
    frozen = None
    if held != "both":
        seed = derive_seed(work.config.seed, "lora_a", 0)
        frozen = initial_factors(work.shapes, server, seed)
    layout = AdapterLayout(work.shapes, server.rank, held)
    return layout.unpack(asked.parts["adapter"], server.scaling, frozen)


def _job(asked: Asked, partition_id: int, server_round: int) -> ClientJob:
    work = asked.work
    spec = _method(work).spec(max(partition_id, 0))
    return ClientJob(
        partition_id=partition_id,
        rows=work.encoded(partition_id, "train"),
        adapter=AdapterLayout(work.shapes, spec.rank).pack(
            start_factors(asked, partition_id, server_round)
        ),
        spec=spec,
        seed=derive_seed(work.config.seed, "client", partition_id, server_round),
        row_weights=weights_of_rows(asked, partition_id),
    )


def _delta(asked: Asked) -> Delta | None:
    if "delta" not in asked.parts:
        return None
    return records.unpack_delta(asked.parts["delta"], asked.body["delta-ranks"], asked.work.shapes)


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
