"""Prompt clients: shared soft prompts in, local training before a frozen model, shared soft prompts out.

A client's prompt is [personal | cluster | shared]. The personal part is read from and written to the client's own
store (`clients.personal`) and is in no message.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
from clients.groups import cluster_of
from clients.outgoing import Trained, encoded_parts
from clients.personal import PersonalStore
from clients.sift import served, trains_alone
from clients.workspace import Asked, Workspace, read
from fedllm_flwr.codecs import decode_difference
from fedllm_flwr.errors import WireError
from fedllm_flwr.models.prompt_start import embeddings_of, start_prompt
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.first_prompts import first_prompts, part_shape
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.unlearning import run_signs
from fedllm_flwr.training.black_box import (
    BlackBoxResult,
    SearchSettings,
    random_projection,
    train_black_box,
)
from fedllm_flwr.training.jobs import ClientJob, LocalResult
from fedllm_flwr.training.local import train as train_jobs

CLUSTER = "cluster/"
START = "cluster-start"


def train(message: Message, context: Context) -> Message:
    """Train the clients that this node hosts of the round's cohort, several in one batched pass where that pays.

    One client's failure is its own: it is reported in its place of the reply, and the others are not affected.
    """
    asked = read(message, context)
    server_round = int(asked.body["server-round"])
    store = _store(context, asked)
    begun, infos = beginnings(asked, lambda p: _begin(asked, p, store, server_round))
    parts: dict[str, np.ndarray] = {}
    results = _train(asked, {p: one.start for p, one in begun.items()}, server_round)
    for result in results:
        partition_id = result.partition_id
        learned: dict[str, np.ndarray] = {}
        reason = result.error
        if not reason:
            learned, reason = _kept(asked, context, result, server_round)
        parts |= {f"{partition_id}/{name}": values for name, values in learned.items()}
        infos[partition_id] = training_info(result) | begun[partition_id].info | {"error": reason}
    return answer_training(asked, message, infos, parts)


@dataclass(frozen=True, eq=False)
class Begun:
    """A client that is about to train: its whole prompt, and what it says beside its training."""

    start: np.ndarray
    info: dict[str, Any]


def _begin(asked: Asked, partition_id: int, store: PersonalStore, server_round: int) -> Begun:
    method = _method(asked.work)
    start = _start(asked, partition_id, store, server_round)
    info = start_sums(asked, partition_id, Adapted(start, method.adapter_spec()))
    info |= _cluster_info(asked.work, partition_id)
    if method.personal_length:
        known = store.load(partition_id, server_round) is not None
        info["personal"] = "kept" if known else "new"
    return Begun(start, info)


def _kept(
    asked: Asked, context: Context, result: LocalResult, server_round: int
) -> tuple[dict[str, np.ndarray], str]:
    """Encode a client's parts for the server, and keep the personal one."""
    method, partition_id = _method(asked.work), result.partition_id
    learned = method.split(result.adapter)
    own = learned.pop("personal", None)

    def encode() -> dict[str, np.ndarray]:
        came = received_parts(asked, partition_id)
        trained = {
            name: Trained(values, came[name], (part_shape(method, name, values.size),))
            for name, values in learned.items()
        }
        sent = encoded_parts(asked, context, partition_id, trained)
        if own is not None:
            _store(context, asked).save(partition_id, server_round, own)
        return sent

    found, reason = attempt(partition_id, "keeping and encoding its prompt", encode)
    return found or {}, reason


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate each client's prompt, its personal part included, on its own held-out rows.

    A client that has never trained has the start value of a personal prompt. Without a prompt in the message it is
    the plain backbone.
    """
    asked = read(message, context)
    store = _store(context, asked)
    after = int(asked.body["server-round"]) + 1

    def model(partition_id: int) -> Adapted:
        if "shared" not in asked.parts:
            return Adapted(None, None)
        spec = _method(asked.work).adapter_spec()
        own = served(asked, partition_id)
        if own is not None:
            return Adapted(own, spec)
        return Adapted(_joined(asked, partition_id, store, after), spec)

    return answer_evaluation(asked, message, model, lambda p: _cluster_info(asked.work, p))


def _train(asked: Asked, starts: dict[int, np.ndarray], server_round: int) -> list[LocalResult]:
    """One pass of local training, or two: the personal prompt first, then what is shared."""
    method = _method(asked.work)
    if method.local_training == "joint":
        return _pass(asked, starts, server_round, ())
    shared = tuple(s.name for s in method.spec().segments if s.name != "personal")
    first = _pass(asked, starts, server_round, ("personal",))
    halfway = {result.partition_id: result.adapter for result in first}
    second = _pass(asked, halfway, server_round, shared)
    return [_both(one, two) for one, two in zip(first, second, strict=True)]


def _pass(
    asked: Asked, starts: dict[int, np.ndarray], server_round: int, trained: tuple[str, ...]
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
            signs=run_signs(work.config.seed, start.size) if trains_alone(work.config) else None,
        )
        for partition_id, start in starts.items()
    ]
    if jobs and _method(work).trainer == "black_box":
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
    parts = received_parts(asked, partition_id)
    if method.personal_length:
        own = store.load(partition_id, before_round)
        parts["personal"] = own if own is not None else first_personal(method, parts["shared"])
    return method.join(parts)


def received_parts(asked: Asked, partition_id: int) -> dict[str, np.ndarray]:
    """The shared prompt and that of the client's cluster, as they came.

    Raises:
        WireError: The message lacks a part.
    """
    names: dict[str, tuple[str, ...]] = {"shared": ("shared",)}
    if _method(asked.work).cluster_length:
        names["cluster"] = (CLUSTER + cluster_of(asked.work, partition_id), START)
    parts = {}
    for part, offered in names.items():
        found = next((asked.parts[name] for name in offered if name in asked.parts), None)
        if found is None:
            raise WireError(
                f"client {partition_id}: expected the part {offered[0]!r}, got {sorted(asked.parts)}"
            )
        parts[part] = _decoded(asked.work, part, found)
    return parts


def _decoded(work: Workspace, part: str, values: np.ndarray) -> np.ndarray:
    """A part's values; a message that tells only the difference means that from the run's first prompt."""
    if values.dtype != np.uint8:
        return values
    first = _first(work)[part]
    shape = part_shape(_method(work), part, first.size)
    return decode_difference(work.config.wire.codec("downlink"), values, first, (shape,))


@lru_cache(maxsize=4)
def _first(work: Workspace) -> dict[str, np.ndarray]:
    config = work.config
    ref = config.model.ref(config.runtime.model_path)
    return first_prompts(_method(work), ref, embeddings_of(work.backbone), config.seed)


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
    whole = dataclasses.replace(
        second,
        first_loss=first.first_loss,
        steps=first.steps + second.steps,
        tokens=first.tokens + second.tokens,
        cpu_seconds=first.cpu_seconds + second.cpu_seconds,
    )
    if isinstance(first, BlackBoxResult) and isinstance(whole, BlackBoxResult):
        return dataclasses.replace(whole, queries=first.queries + whole.queries)
    return whole


def _cluster_info(work: Workspace, partition_id: int) -> dict[str, Any]:
    if not _method(work).cluster_length:
        return {}
    return {"cluster": cluster_of(work, partition_id)}


def _store(context: Context, asked: Asked) -> PersonalStore:
    return PersonalStore(
        context, str(asked.body.get("run", "")), asked.work.config.keep_checkpoints + 1
    )


def _method(work: Workspace) -> FedPromptConfig:
    method = work.config.method
    assert isinstance(method, FedPromptConfig)  # noqa: S101  # the table of clients says so
    return method
