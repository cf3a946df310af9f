"""LoRA clients: adapter values in, local training over the shared frozen backbone, adapter values out."""

from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Context, Message

from clients.workspace import Asked, Workspace, read
from fedllm_flwr import records
from fedllm_flwr.averaging import Delta, LoraFactors, rescale, resize
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, Side, initial_factors
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.training.evaluate import evaluate as evaluate_rows
from fedllm_flwr.training.local import ClientJob, LocalResult
from fedllm_flwr.training.local import train as train_jobs
from fedllm_flwr.training.settings import LocalSettings


def train(message: Message, context: Context) -> Message:
    """Train the clients that this node hosts of the round's cohort, several in one batched pass where that pays.

    One client's failure is its own: it is reported in its place of the reply, and the others are not affected.
    """
    asked = read(message, context)
    work, server_round, side = asked.work, int(asked.body["server-round"]), asked.body["side"]
    jobs = [_job(asked, partition_id, server_round) for partition_id in asked.partition_ids]
    settings = local_settings(work, float(asked.body["learning-rate"]), side)
    head = work.encoder().head_token_ids
    results = train_jobs(work.backbone, jobs, settings, head_token_ids=head, delta=_delta(asked))
    infos, parts = [], {}
    for job, result in zip(jobs, results, strict=True):
        infos.append(_info(result))
        if not result.error:
            parts[f"{result.partition_id}/adapter"] = _one_side(
                work, job.spec, result.adapter, side
            )
    trained = sum(info["num-examples"] for info in infos)
    return Message(
        records.answer({"clients": infos}, parts, work.config.wire.uplink, trained),
        reply_to=message,
    )


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on each client's own held-out rows.

    The adapter is the server's, at its full rank: that is what a run exports, also where clients train lower ranks.
    Without an adapter in the message it is the backbone and the carried delta.
    """
    asked = read(message, context)
    work = asked.work
    template = str(asked.body.get("template", ""))
    encoder = work.encoder(template)
    spec = work.config.method.server_spec()
    adapter = None
    if "adapter" in asked.parts:
        adapter = AdapterLayout(work.shapes, spec.rank).pack(received_factors(asked))
    infos: list[dict[str, Any]] = []
    for partition_id in asked.partition_ids:
        splits = {}
        for split in asked.body["splits"]:
            sums = evaluate_rows(
                work.backbone,
                work.encoded(partition_id, split, template),
                head_token_ids=encoder.head_token_ids,
                label_token_ids=encoder.label_token_ids,
                adapter=adapter,
                spec=spec if adapter is not None else None,
                delta=_delta(asked),
            )
            splits[split] = asdict(sums)
        infos.append({"partition-id": partition_id, "splits": splits})
    counted = sum(sums["total"] for info in infos for sums in info["splits"].values())
    return Message(records.answer({"clients": infos}, {}, "float32", counted), reply_to=message)


def local_settings(work: Workspace, learning_rate: float, side: Side) -> LocalSettings:
    """The training loop's settings for one round."""
    client, optimizer = work.config.client, work.config.optimizer
    return LocalSettings(
        batch_size=client.batch_size,
        local_epochs=max(1, client.local_epochs),
        local_steps=client.local_steps,
        learning_rate=learning_rate,
        optimizer=optimizer.name,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        gradient_accumulation=client.gradient_accumulation,
        clip_norm=client.clip_norm,
        proximal_mu=client.proximal_mu,
        cohort_tokens=work.config.runtime.cohort_tokens,
        side=side,
    )


def start_factors(asked: Asked, partition_id: int, server_round: int) -> dict[str, LoraFactors]:
    """The adapter that a client begins a round with, at its own rank and scaling.

    Without an adapter in the message it is a fresh seeded draw: A from the round's address, B = 0.
    """
    work = asked.work
    spec = work.config.method.spec(max(partition_id, 0))
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
    server = work.config.method.server_spec()
    held: Side = asked.body["side-held"]
    frozen = None
    if held != "both":
        seed = derive_seed(work.config.seed, "lora_a", 0)
        frozen = initial_factors(work.shapes, server, seed)
    layout = AdapterLayout(work.shapes, server.rank, held)
    return layout.unpack(asked.parts["adapter"], server.scaling, frozen)


def _job(asked: Asked, partition_id: int, server_round: int) -> ClientJob:
    work = asked.work
    spec = work.config.method.spec(max(partition_id, 0))
    return ClientJob(
        partition_id=partition_id,
        rows=work.encoded(partition_id, "train"),
        adapter=AdapterLayout(work.shapes, spec.rank).pack(
            start_factors(asked, partition_id, server_round)
        ),
        spec=spec,
        seed=derive_seed(work.config.seed, "client", partition_id, server_round),
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


def _info(result: LocalResult) -> dict[str, Any]:
    return {
        "partition-id": result.partition_id,
        "num-examples": result.num_examples,
        "loss": result.loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "cpu-seconds": result.cpu_seconds,
        "error": result.error,
    }
