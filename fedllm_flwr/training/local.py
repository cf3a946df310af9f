"""Local training of the clients that one worker hosts.

Clients with the same kind of adapter share forward and backward passes under a token budget; the
others train one after the other. Both give the same adapters to rounding, in any order of the clients.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from fedllm_flwr.averaging import Delta
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cohort import delta_active
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.loop import Trainee, run
from fedllm_flwr.training.memory import FREE_MEMORY
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import make_stack

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ClientJob:
    """What one client trains on in one round.

    Attributes:
        partition_id: The client.
        rows: Its encoded training rows.
        adapter: Start values, both sides: flat float32 in the order of AdapterLayout.
        spec: Settings of the adapter.
        seed: Address of the row order and of dropout masks, of this client and round.
    """

    partition_id: int
    rows: Sequence[Encoded]
    adapter: np.ndarray
    spec: LoraSpec
    seed: int


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What one client did.

    Attributes:
        partition_id: The client.
        adapter: Both sides, flat float32; the start values if there was an error.
        first_loss: Loss of the first step, before any update, in nats per label token.
        loss: Mean loss of the steps; like ``first_loss`` not a number if there was none.
        num_examples: Rows trained on: the client's weight.
        steps: Optimizer steps done.
        tokens: Input tokens read in all steps, padding not counted.
        cpu_seconds: CPU time, divided by tokens among clients that trained together.
        error: Why the client has no result, or empty.
    """

    partition_id: int
    adapter: np.ndarray
    first_loss: float
    loss: float
    num_examples: int
    steps: int
    tokens: int
    cpu_seconds: float
    error: str = ""


def train(
    backbone: Backbone,
    jobs: Sequence[ClientJob],
    settings: LocalSettings,
    *,
    head_token_ids: tuple[int, ...] | None = None,
    delta: Delta | None = None,
) -> list[LocalResult]:
    """Train clients; a client that fails is reported and does not disturb the others.

    Global random state is neither read nor changed, and the backbone is plain and bit-equal afterwards.

    Args:
        backbone: The shared model.
        jobs: The clients.
        settings: How each of them trains.
        head_token_ids: Tokens that the loss is restricted to, in the order that targets index; None
            when targets are token ids.
        delta: A frozen update that every client carries.

    Returns:
        One result per job, in order. ``error`` is set where a client has no usable rows, raises, or
        gets a loss or an adapter that is not finite.
    """
    results = {
        index: _failed(job, f"expected rows with label tokens, got none in {len(job.rows)} rows")
        for index, job in enumerate(jobs)
    }
    usable = {
        index: replace(job, rows=rows)
        for index, job in enumerate(jobs)
        if (rows := [row for row in job.rows if len(row.targets)])
    }
    with delta_active(backbone, delta or {}):
        for cohort in plan_cohorts(usable, settings):
            members = [usable[index] for index in cohort]
            done = _train_cohort(
                backbone, members, settings, head_token_ids, plain_layers=not delta
            )
            results.update(zip(cohort, done, strict=True))
    FREE_MEMORY.release()
    return [results[index] for index in range(len(jobs))]


def plan_cohorts(jobs: Mapping[int, ClientJob], settings: LocalSettings) -> list[list[int]]:
    """Divide clients into cohorts that train together.

    Clients share a cohort if their adapters are of the same kind, without dropout, and clients x
    rows of a micro-batch x longest row stays within ``settings.cohort_tokens``. They are taken by
    rising length, so that little is padded.

    Args:
        jobs: The clients under any index, each with at least one row.
        settings: Micro-batch size and token budget.

    Returns:
        Indices of the jobs of each cohort; every job is in exactly one.
    """

    def size(index: int) -> tuple[int, int]:
        rows = jobs[index].rows
        return max(len(row.input_ids) for row in rows), min(len(rows), settings.batch_size)

    def kind(index: int) -> str:
        return repr(jobs[index].spec)

    order = sorted(jobs, key=lambda i: (kind(i), size(i), jobs[i].partition_id, i))
    cohorts: list[list[int]] = []
    for _, group in groupby(order, key=kind):
        current: list[int] = []
        most = 0
        for index in group:
            longest, rows = size(index)
            most = max(most, rows)
            fits = (len(current) + 1) * most * longest <= settings.cohort_tokens
            if current and fits and not jobs[index].spec.dropout:
                current.append(index)
            else:
                current, most = [index], rows
                cohorts.append(current)
    return cohorts


def _train_cohort(
    backbone: Backbone,
    jobs: Sequence[ClientJob],
    settings: LocalSettings,
    head_token_ids: tuple[int, ...] | None,
    *,
    plain_layers: bool,
) -> list[LocalResult]:
    """Train clients together; if that raises, one by one, so that only the culprit fails."""
    try:
        return _attempt(backbone, jobs, settings, head_token_ids, plain_layers=plain_layers)
    except Exception as error:
        if len(jobs) == 1:
            LOG.debug("client %d failed", jobs[0].partition_id, exc_info=True)
            return [_failed(jobs[0], f"{type(error).__name__}: {error}")]
        clients = ", ".join(str(job.partition_id) for job in jobs)
        LOG.warning("cohort of clients %s failed (%s); training them one by one", clients, error)
    alone = (
        _train_cohort(backbone, [job], settings, head_token_ids, plain_layers=plain_layers)
        for job in jobs
    )
    return [result for [result] in alone]


def _attempt(
    backbone: Backbone,
    jobs: Sequence[ClientJob],
    settings: LocalSettings,
    head_token_ids: tuple[int, ...] | None,
    *,
    plain_layers: bool,
) -> list[LocalResult]:
    """Train clients of one kind of adapter in step with each other."""
    began = time.process_time()
    stack = make_stack(backbone, jobs[0].spec, len(jobs), settings.side, plain_layers=plain_layers)
    trainees = []
    for place, job in enumerate(jobs):
        stack.load(place, job.adapter)
        values = stack.parameters(place)
        trainees.append(Trainee(place, job.rows, values, settings=settings, seed=job.seed))
    run(backbone, stack, trainees, head_token_ids)
    adapters = [stack.read(place) for place in range(len(jobs))]
    spent = (time.process_time() - began) / max(1, sum(trainee.tokens for trainee in trainees))
    return [
        _result(job, trainee, adapter, spent)
        for job, trainee, adapter in zip(jobs, trainees, adapters, strict=True)
    ]


def _result(
    job: ClientJob, trainee: Trainee, adapter: np.ndarray, seconds_per_token: float
) -> LocalResult:
    """What a client reports once its cohort is done."""
    if trainee.error:
        return _failed(job, trainee.error)
    if not np.isfinite(adapter).all():
        return _failed(job, f"adapter is not finite after step {len(trainee.losses)}")
    return LocalResult(
        partition_id=job.partition_id,
        adapter=adapter,
        first_loss=trainee.losses[0],
        loss=sum(trainee.losses) / len(trainee.losses),
        num_examples=len(trainee.rows),
        steps=len(trainee.losses),
        tokens=trainee.tokens,
        cpu_seconds=seconds_per_token * trainee.tokens,
    )


def _failed(job: ClientJob, reason: str) -> LocalResult:
    """The result of a client that has none, with the first line of the reason."""
    return LocalResult(
        partition_id=job.partition_id,
        adapter=np.array(job.adapter, dtype=np.float32, copy=True),
        first_loss=math.nan,
        loss=math.nan,
        num_examples=0,
        steps=0,
        tokens=0,
        cpu_seconds=0.0,
        error=f"client {job.partition_id}: {reason}".splitlines()[0],
    )
