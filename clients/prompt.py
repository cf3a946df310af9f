"""Prompt clients: shared soft prompts in, local training before a frozen model, shared soft prompts out.

A client's prompt is [personal | cluster | shared]. The personal part is read from and written to the client's own
store (`clients.personal`) and is in no message.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

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
from clients.groups import cluster_of
from clients.personal import PersonalStore
from clients.workspace import Asked, Workspace, read
from fedllm_flwr import records
from fedllm_flwr.errors import WireError
from fedllm_flwr.models.prompt_start import embeddings_of, start_prompt
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.training.black_box import SearchSettings, random_projection, train_black_box
from fedllm_flwr.training.local import ClientJob, LocalResult
from fedllm_flwr.training.local import train as train_jobs

CLUSTER = "cluster/"
START = "cluster-start"


def train(message: Message, context: Context) -> Message:
    """Train the clients that this node hosts of the round's cohort, several in one batched pass where that pays.

    One client's failure is its own: it is reported in its place of the reply, and the others are not affected.
    """
    asked = read(message, context)
    server_round = int(asked.body["server-round"])
    store = _store(context, asked.work)
    starts = [_start(asked, p, store, server_round) for p in asked.partition_ids]
    firsts = [
        start_sums(asked, p, Adapted(start, _method(asked.work).adapter_spec()))
        for p, start in zip(asked.partition_ids, starts, strict=True)
    ]
    results = _train(asked, starts, server_round)
    infos: list[dict[str, Any]] = []
    parts: dict[str, np.ndarray] = {}
    for result, first in zip(results, firsts, strict=True):
        info = training_info(result) | first
        if not result.error:
            learned = _method(asked.work).split(result.adapter)
            if "personal" in learned:
                store.save(result.partition_id, server_round, learned.pop("personal"))
            parts |= {f"{result.partition_id}/{name}": v for name, v in learned.items()}
        infos.append(info | _cluster_info(asked.work, result.partition_id))
    trained = sum(info["num-examples"] for info in infos)
    return Message(
        records.answer({"clients": infos}, parts, asked.work.config.wire.uplink, trained),
        reply_to=message,
    )


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate each client's prompt, its personal part included, on its own held-out rows.

    A client that has never trained has the start value of a personal prompt. Without a prompt in the message it is
    the plain backbone.
    """
    asked = read(message, context)
    store = _store(context, asked.work)
    after = int(asked.body["server-round"]) + 1

    def model(partition_id: int) -> Adapted:
        if "shared" not in asked.parts:
            return Adapted(None, None)
        spec = _method(asked.work).adapter_spec()
        return Adapted(_joined(asked, partition_id, store, after), spec)

    return answer_evaluation(asked, message, model, lambda p: _cluster_info(asked.work, p))


def _train(asked: Asked, starts: list[np.ndarray], server_round: int) -> list[LocalResult]:
    """One pass of local training, or two: the personal prompt first, then what is shared."""
    method = _method(asked.work)
    if method.local_training == "joint":
        return _pass(asked, starts, server_round, ())
    shared = tuple(s.name for s in method.spec().segments if s.name != "personal")
    first = _pass(asked, starts, server_round, ("personal",))
    second = _pass(asked, [r.adapter for r in first], server_round, shared)
    return [_both(one, two) for one, two in zip(first, second, strict=True)]


def _pass(
    asked: Asked, starts: list[np.ndarray], server_round: int, trained: tuple[str, ...]
) -> list[LocalResult]:
    work = asked.work
    encoder = work.encoder()
    label = "-".join(("client", *trained))
    jobs = [
        ClientJob(
            partition_id=partition_id,
            rows=work.encoded(partition_id, "train"),
            adapter=start,
            spec=_method(work).adapter_spec(),
            seed=derive_seed(work.config.seed, label, partition_id, server_round),
            trained=trained,
            row_weights=weights_of_rows(asked, partition_id),
        )
        for partition_id, start in zip(asked.partition_ids, starts, strict=True)
    ]
    if _method(work).trainer == "black_box":
        return _search(work, jobs)
    settings = local_settings(work, float(asked.body["learning-rate"]))
    return train_jobs(
        work.backbone,
        jobs,
        settings,
        head_token_ids=encoder.head_token_ids,
        fixed_ids=encoder.fixed_ids,
    )


def _search(work: Workspace, jobs: Sequence[ClientJob]) -> list[LocalResult]:
    """Local search by queries alone, in a subspace that all clients share."""
    method, encoder = _method(work), work.encoder()
    settings = SearchSettings(
        dimension=method.search_dimension,
        population=method.search_population,
        generations=method.search_generations,
        sigma=method.search_sigma,
    )
    projection = random_projection(
        jobs[0].adapter.size,
        settings,
        embedding_rms=embeddings_of(work.backbone).mean_rms,
        seed=derive_seed(work.config.seed, "projection"),
    )
    return list(
        train_black_box(
            work.backbone,
            jobs,
            settings,
            projection,
            head_token_ids=encoder.head_token_ids,
            fixed_ids=encoder.fixed_ids,
        )
    )


def _start(asked: Asked, partition_id: int, store: PersonalStore, server_round: int) -> np.ndarray:
    """The prompt that a client begins a round with."""
    method = _method(asked.work)
    if method.common_start or server_round > 1:
        return _joined(asked, partition_id, store, server_round)
    embeddings = embeddings_of(asked.work.backbone)
    seed = derive_seed(asked.work.config.seed, "own prompt", partition_id)
    return start_prompt(embeddings, method.spec().length, method.start, seed, method.start_text)


def _joined(asked: Asked, partition_id: int, store: PersonalStore, before_round: int) -> np.ndarray:
    """[personal | cluster | shared] as one flat array.

    Raises:
        WireError: The message lacks a part.
    """
    method = _method(asked.work)
    if "shared" not in asked.parts:
        raise WireError(
            f"client {partition_id}: expected the part 'shared', got {sorted(asked.parts)}"
        )
    parts = {"shared": asked.parts["shared"]}
    if method.cluster_length:
        name = CLUSTER + cluster_of(asked.work, partition_id)
        found = asked.parts.get(name, asked.parts.get(START))
        if found is None:
            raise WireError(
                f"client {partition_id}: expected the part {name!r}, got {sorted(asked.parts)}"
            )
        parts["cluster"] = found
    if method.personal_length:
        own = store.load(partition_id, before_round)
        parts["personal"] = own if own is not None else first_personal(method, parts["shared"])
    return method.join(parts)


def first_personal(method: FedPromptConfig, shared: np.ndarray) -> np.ndarray:
    """The personal prompt of a client that has none yet: the mean of the shared prompt's vectors, or zeros."""
    mean = shared.reshape(method.length, -1).mean(axis=0)
    if method.personal_start == "zero":
        mean = np.zeros_like(mean)
    return np.tile(mean, method.personal_length)


def _both(first: LocalResult, second: LocalResult) -> LocalResult:
    """Two passes of one client as one result."""
    if first.error or second.error:
        return first if first.error else second
    return dataclasses.replace(
        second,
        first_loss=first.first_loss,
        steps=first.steps + second.steps,
        tokens=first.tokens + second.tokens,
        cpu_seconds=first.cpu_seconds + second.cpu_seconds,
    )


def _cluster_info(work: Workspace, partition_id: int) -> dict[str, Any]:
    if not _method(work).cluster_length:
        return {}
    return {"cluster": cluster_of(work, partition_id)}


def _store(context: Context, work: Workspace) -> PersonalStore:
    return PersonalStore(context, work.fingerprint, work.config.keep_checkpoints + 1)


def _method(work: Workspace) -> FedPromptConfig:
    method = work.config.method
    assert isinstance(method, FedPromptConfig)  # noqa: S101  # the table of clients says so
    return method
