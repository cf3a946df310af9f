"""What clients of every method do alike: settings of local training, measuring a model, answering."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message

from clients.groups import (
    evaluation_sums,
    group_sums,
    measured_groups,
    row_weights,
    trained_groups,
)
from clients.sift import trains_alone
from clients.workspace import Asked, Workspace
from fedllm_flwr import records
from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import FedLLMError, WireError
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedResPromptConfig
from fedllm_flwr.settings.privacy import SamplePrivacy as SamplePrivacyConfig
from fedllm_flwr.training.black_box import BlackBoxResult
from fedllm_flwr.training.evaluate import row_scores
from fedllm_flwr.training.jobs import ClientJob, LocalResult
from fedllm_flwr.training.local import train as train_jobs
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy, Side
from fedllm_flwr.training.stacks import AdapterSpec

LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model to measure: the backbone under an adapter and a carried delta, both optional."""

    adapter: np.ndarray | None
    spec: AdapterSpec | None
    delta: Delta | None = None


def local_settings(work: Workspace, learning_rate: float, side: Side = "both") -> LocalSettings:
    """The training loop's settings for one round."""
    client, optimizer, privacy = work.config.client, work.config.optimizer, work.config.privacy
    method = work.config.method
    rows = (
        SamplePrivacy(clip_norm=privacy.clip_norm, noise_multiplier=privacy.noise_multiplier)
        if isinstance(privacy, SamplePrivacyConfig)
        else None
    )
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
        cohort_tokens=0 if trains_alone(work.config) else work.config.runtime.cohort_tokens,
        side=side,
        sample_privacy=rows,
        checkpointing=not isinstance(method, FedResPromptConfig) and method.checkpointing,
    )


def scored(
    work: Workspace, partition_id: int, split: str, model: Adapted, template: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, label tokens and correctness of each of a client's rows (see ``training.evaluate.row_scores``)."""
    encoder = work.encoder(template)
    return row_scores(
        work.backbone,
        work.encoded(partition_id, split, template),
        head_token_ids=encoder.head_token_ids,
        label_token_ids=encoder.label_token_ids,
        adapter=model.adapter,
        spec=model.spec,
        delta=model.delta,
        fixed_ids=encoder.fixed_ids,
    )


def attempt(partition_id: int, what: str, function: Callable[[], T]) -> tuple[T | None, str]:
    """Do something for one client; its failure is its own, and what it says stays in the node's log.

    Args:
        partition_id: The client.
        what: What is done, for the message.
        function: Does it.

    Returns:
        The result and no reason, or no result and a reason that names neither rows nor paths.
    """
    try:
        return function(), ""
    except WireError as error:  # about the message, which the server knows
        return None, str(error)
    except (FedLLMError, OSError, ValueError, RuntimeError, ArithmeticError) as error:
        LOG.error("client %d: %s failed", partition_id, what, exc_info=True)
        kind = type(error).__name__
        return None, f"client {partition_id}: {what} failed ({kind}); the node's log says why"


def beginnings(
    asked: Asked, begin: Callable[[int], T]
) -> tuple[dict[int, T], dict[int, dict[str, Any]]]:
    """What every asked client begins its training with.

    Args:
        asked: The message, read.
        begin: Makes it for one client.

    Returns:
        By client what ``begin`` has made, and the answers of the clients for which it failed.
    """
    begun: dict[int, T] = {}
    infos: dict[int, dict[str, Any]] = {}
    for partition_id in asked.partition_ids:
        found, reason = attempt(partition_id, "start", lambda p=partition_id: begin(p))  # type: ignore[misc]
        if found is None:
            infos[partition_id] = {"partition-id": partition_id, "error": reason}
        else:
            begun[partition_id] = found
    return begun, infos


def answer_training(
    asked: Asked,
    message: Message,
    infos: Mapping[int, Mapping[str, Any]],
    parts: Mapping[str, np.ndarray],
) -> Message:
    """The reply to a training message: the answers of all asked clients in their order, and their parts."""
    answers = [infos[partition_id] for partition_id in asked.partition_ids]
    trained = sum(info.get("num-examples", 0) for info in answers)
    content = records.answer({"clients": answers}, parts, asked.work.config.wire.uplink, trained)
    return Message(content, reply_to=message)


def start_sums(asked: Asked, partition_id: int, model: Adapted) -> dict[str, Any]:
    """A client's sums per group over its training rows at the model that the round begins with, if asked for."""
    if "group-weights" not in asked.body:
        return {}
    found = scored(asked.work, partition_id, "train", model)
    return {"groups": group_sums(trained_groups(asked.work, partition_id), *found)}


def weights_of_rows(asked: Asked, partition_id: int) -> np.ndarray | None:
    """What each of a client's training rows weighs under the round's multipliers; None where all weigh 1."""
    weights = asked.body.get("group-weights")
    return row_weights(trained_groups(asked.work, partition_id), weights) if weights else None


def answer_evaluation(
    asked: Asked,
    message: Message,
    model_of: Callable[[int], Adapted],
    more: Callable[[int], dict[str, Any]] = lambda _: {},
) -> Message:
    """Measure each asked client's model on its own held-out rows.

    With ``tune-steps`` in the message the client first trains its model for so many steps on its own training rows;
    the result is measured and thrown away. One client's failure is its own.

    Args:
        asked: The message, read.
        message: The message.
        model_of: A client's model.
        more: What else a client says.
    """
    infos: list[dict[str, Any]] = []
    for partition_id in asked.partition_ids:
        found, reason = attempt(
            partition_id,
            "evaluation",
            lambda p=partition_id: _measured(asked, p, model_of(p)) | more(p),  # type: ignore[misc]
        )
        infos.append(found or {"partition-id": partition_id, "error": reason})
    counted = sum(s["total"] for info in infos for s in info.get("splits", {}).values())
    return Message(records.answer({"clients": infos}, {}, "float32", counted), reply_to=message)


def training_info(result: LocalResult) -> dict[str, Any]:
    """What a client says about its training; where single rows are private, nothing that is computed from them."""
    if result.releases is not None:
        return {
            "partition-id": result.partition_id,
            "num-examples": result.num_examples,
            "steps": result.steps,
            "withheld": True,
            "error": result.error,
        }
    return {
        "partition-id": result.partition_id,
        "num-examples": result.num_examples,
        "loss": result.loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "cpu-seconds": result.cpu_seconds,
        "error": result.error,
        **({"queries": result.queries} if isinstance(result, BlackBoxResult) else {}),
    }


def _measured(asked: Asked, partition_id: int, model: Adapted) -> dict[str, Any]:
    work, template = asked.work, str(asked.body.get("template", ""))
    if asked.body.get("tune-steps"):
        model = _tuned(asked, partition_id, model)
    splits: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for split in asked.body["splits"]:
        rows = work.encoded(partition_id, split, template)
        found = scored(work, partition_id, split, model, template)
        splits[split] = evaluation_sums(rows, *found)
        names = measured_groups(work, partition_id, split)
        if names is not None:
            groups[split] = _by_group(names, rows, found)
    info = {"partition-id": partition_id, "splits": splits}
    return info | ({"groups": groups} if groups else {})


def _by_group(
    names: list[str], rows: Any, found: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> dict[str, Any]:
    sums = {}
    for name in sorted(set(names)):
        chosen = [i for i, own in enumerate(names) if own == name]
        sums[name] = evaluation_sums([rows[i] for i in chosen], *(part[chosen] for part in found))
    return sums


def _tuned(asked: Asked, partition_id: int, model: Adapted) -> Adapted:
    """The model after some steps of the client's own; nothing of it is kept.

    Raises:
        RuntimeError: Training failed.
    """
    assert model.adapter is not None  # noqa: S101  # tuning starts from an adapter
    assert model.spec is not None  # noqa: S101
    work = asked.work
    encoder = work.encoder()
    settings = dataclasses.replace(
        local_settings(work, float(asked.body["learning-rate"])),
        local_steps=int(asked.body["tune-steps"]),
    )
    job = ClientJob(
        partition_id=partition_id,
        rows=work.encoded(partition_id, "train"),
        adapter=model.adapter,
        spec=model.spec,
        seed=derive_seed(work.config.seed, "tune", partition_id),
    )
    [result] = train_jobs(work.backbone, [job], settings, head_token_ids=encoder.head_token_ids,
                          delta=model.delta, fixed_ids=encoder.fixed_ids)  # fmt: skip
    if result.error:
        raise RuntimeError(result.error)
    return dataclasses.replace(model, adapter=result.adapter)
