"""Local training of the clients that one worker hosts.

Clients with the same kind of adapter share forward and backward passes under a token budget; the
others train one after the other. Both give the same adapters to rounding, in any order of the clients. With
sample-level privacy a client's rows share passes in place of clients.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cohort import delta_active
from fedllm_flwr.training.jobs import ClientJob, LocalResult, failed, labelled, problem_of
from fedllm_flwr.training.loop import Trainee, run
from fedllm_flwr.training.memory import FREE_MEMORY
from fedllm_flwr.training.private import PrivateTrainee, plan_private, run_private
from fedllm_flwr.training.prompt_stacks import check_rows, extra_positions, reused_tokens
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import AdapterStack, make_stack, trains_alone

LOG = logging.getLogger(__name__)


def train(
    backbone: Backbone,
    jobs: Sequence[ClientJob],
    settings: LocalSettings,
    *,
    head_token_ids: tuple[int, ...] | None = None,
    delta: Delta | None = None,
    fixed_ids: tuple[int, ...] = (),
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
        fixed_ids: The text that all rows begin with; only a prompt behind it makes use of it.

    Returns:
        One result per job, in order. ``error`` is set where a client has no usable rows, raises, or
        gets a loss or an adapter that is not finite.
    """
    problems = {index: problem_of(job) for index, job in enumerate(jobs)}
    results = {index: failed(jobs[index], why) for index, why in problems.items() if why}
    usable = {index: labelled(jobs[index]) for index, why in problems.items() if not why}
    specs = [job.spec for job in usable.values()]
    plain = not delta
    reused = reused_tokens(backbone, specs, fixed_ids, plain_layers=plain)
    call = _Call(backbone, settings, head_token_ids, plain, fixed_ids, reused)
    with delta_active(backbone, delta or {}):
        for cohort in plan_cohorts(usable, settings, reused):
            done = _train_cohort(call, [usable[index] for index in cohort])
            results.update(zip(cohort, done, strict=True))
    FREE_MEMORY.release()
    return [results[index] for index in range(len(jobs))]


def plan_cohorts(
    jobs: Mapping[int, ClientJob], settings: LocalSettings, reused: int = 0
) -> list[list[int]]:
    """Divide clients into cohorts that train together.

    Clients share a cohort if the same is trained of adapters of the same kind, none that has to be alone, and
    clients x rows of a micro-batch x positions of the longest row, a soft prompt's included, stays within
    ``settings.cohort_tokens``. They are taken by rising length, so that little is padded. With
    ``settings.sample_privacy`` every client is a cohort of its own.

    Args:
        jobs: The clients under any index, each with at least one row.
        settings: Micro-batch size and token budget.
        reused: Tokens at the start of every row that prompts behind them need not compute.

    Returns:
        Indices of the jobs of each cohort; every job is in exactly one.
    """

    def size(index: int) -> tuple[int, int]:
        rows = jobs[index].rows
        longest = max(len(row.input_ids) for row in rows)
        extra = extra_positions(jobs[index].spec, reused)
        return longest + extra, min(len(rows), settings.batch_size)

    def kind(index: int) -> str:
        return repr((jobs[index].spec, sorted(set(jobs[index].trained))))

    private = settings.sample_privacy is not None
    order = sorted(jobs, key=lambda i: (kind(i), size(i), jobs[i].partition_id, i))
    cohorts: list[list[int]] = []
    for _, group in groupby(order, key=kind):
        current: list[int] = []
        most = 0
        for index in group:
            longest, rows = size(index)
            most = max(most, rows)
            fits = (len(current) + 1) * most * longest <= settings.cohort_tokens
            if current and fits and not private and not trains_alone(jobs[index].spec):
                current.append(index)
            else:
                current, most = [index], rows
                cohorts.append(current)
    return cohorts


@dataclass(frozen=True, eq=False)
class _Call:
    """What all cohorts of one call of :func:`train` share."""

    backbone: Backbone
    settings: LocalSettings
    head_token_ids: tuple[int, ...] | None
    plain_layers: bool
    fixed_ids: tuple[int, ...]
    reused: int


def _train_cohort(call: _Call, jobs: Sequence[ClientJob]) -> list[LocalResult]:
    """Train clients together; if that raises, one by one, so that only the culprit fails."""
    try:
        return _attempt(call, jobs)
    except Exception as error:
        if len(jobs) == 1:
            return [failed(jobs[0], _reason(jobs[0], error))]
        clients = ", ".join(str(job.partition_id) for job in jobs)
        LOG.warning("cohort of clients %s failed (%s); training them one by one", clients, error)
    alone = (_train_cohort(call, [job]) for job in jobs)
    return [result for [result] in alone]


def _reason(job: ClientJob, error: Exception) -> str:
    """What the server is told: of settings and sizes, which it knows, and no text that may name a row or a path."""
    kind = type(error).__name__
    if isinstance(error, ShapeError | ConfigError):
        return f"{kind}: {error}"
    LOG.error("client %d: training failed", job.partition_id, exc_info=error)
    return f"training failed ({kind}); the node's log says why"


def _attempt(call: _Call, jobs: Sequence[ClientJob]) -> list[LocalResult]:
    """Train clients of one kind of adapter in step with each other."""
    if call.settings.sample_privacy is not None:
        return [_attempt_privately(call, job) for job in jobs]
    began = time.process_time()
    spec, settings = jobs[0].spec, call.settings
    stack = _stack(call, jobs[0], len(jobs))
    trainees = []
    for place, job in enumerate(jobs):
        check_rows(spec, job.rows, call.fixed_ids)
        signs = _signs_of(stack, place, job)
        stack.load(place, job.adapter)
        trainee = Trainee(
            place,
            job.rows,
            stack.parameters(place),
            settings=settings,
            seed=job.seed,
            row_weights=job.row_weights,
            signs=signs,
        )
        trainees.append(trainee)
    extra = extra_positions(spec, call.reused)
    run(call.backbone, stack, trainees, call.head_token_ids, extra)
    adapters = [stack.read(place) for place in range(len(jobs))]
    spent = (time.process_time() - began) / max(1, sum(trainee.tokens for trainee in trainees))
    return [
        _result(job, trainee, adapter, spent)
        for job, trainee, adapter in zip(jobs, trainees, adapters, strict=True)
    ]


def _signs_of(stack: AdapterStack, place: int, job: ClientJob) -> list[torch.Tensor]:
    """A client's signs in the places of its trained values, put there and read as an adapter would be."""
    if job.signs is None:
        return []
    stack.load(place, job.signs.astype(np.float32))
    return [parameter.detach().clone() for parameter in stack.parameters(place)]


def _attempt_privately(call: _Call, job: ClientJob) -> LocalResult:
    """Train one client with noise; the rows of a pass each have a copy of its adapter."""
    if job.signs is not None:
        raise ConfigError("sample_privacy: expected no signs, which are not covered by the account")
    if job.row_weights is not None:
        raise ConfigError(
            "sample_privacy: expected no row_weights, which depend on what other rows there are, "
            f"got weights of {len(job.row_weights)} rows"
        )
    began = time.process_time()
    check_rows(job.spec, job.rows, call.fixed_ids)
    random = np.random.default_rng() if job.random is None else job.random
    extra = extra_positions(job.spec, call.reused)
    alone = trains_alone(job.spec)
    plan = plan_private(job.rows, call.settings, random, extra=extra, alone=alone)
    stack = _stack(call, job, plan.slots)
    for slot in range(plan.slots):
        stack.load(slot, job.adapter)
    slots = [stack.parameters(slot) for slot in range(plan.slots)]
    trainee = PrivateTrainee(job.rows, slots, plan, settings=call.settings, random=random)
    run_private(call.backbone, stack, trainee, plan, call.head_token_ids)
    spent = (time.process_time() - began) / max(1, trainee.tokens)
    result = _result(job, trainee, stack.read(0), spent)
    return result if result.error else replace(result, releases=plan.releases)


def _stack(call: _Call, job: ClientJob, places: int) -> AdapterStack:
    """Places for adapters of a client's kind."""
    return make_stack(
        call.backbone,
        job.spec,
        places,
        call.settings.side,
        plain_layers=call.plain_layers,
        trained=job.trained,
        fixed_ids=call.fixed_ids,
        checkpointing=call.settings.checkpointing,
    )


def _result(
    job: ClientJob, trainee: Trainee | PrivateTrainee, adapter: np.ndarray, seconds_per_token: float
) -> LocalResult:
    """What a client reports once its cohort is done."""
    if trainee.error:
        return failed(job, trainee.error)
    if not np.isfinite(adapter).all():
        return failed(job, f"adapter is not finite after step {len(trainee.losses)}")
    losses = [loss for loss in trainee.losses if not math.isnan(loss)]
    return LocalResult(
        partition_id=job.partition_id,
        adapter=adapter,
        first_loss=losses[0] if losses else math.nan,
        loss=sum(losses) / len(losses) if losses else math.nan,
        num_examples=len(trainee.rows),
        steps=len(trainee.losses),
        tokens=trainee.tokens,
        cpu_seconds=seconds_per_token * trainee.tokens,
    )
