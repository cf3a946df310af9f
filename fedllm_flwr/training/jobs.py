"""A client's work of one round, and what comes of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.private import Releases
from fedllm_flwr.training.stacks import AdapterSpec


@dataclass(frozen=True, eq=False)
class ClientJob:
    """What one client trains on in one round.

    Attributes:
        partition_id: The client.
        rows: Its encoded training rows.
        adapter: Start values, flat float32: both sides in the order of AdapterLayout, a whole soft prompt, or
            the values of PEFT's module.
        spec: Settings of the adapter.
        seed: Address of the row order and of dropout masks, of this client and round.
        trained: Segments of a soft prompt that are trained; none stands for all. The others stay bit-equal.
        row_weights: Weight >= 0 of each row's loss, [n]; None = 1. The loss of a step is the sum of its rows'
            weighted losses over its label tokens, weights not counted among these. Not with ``sample_privacy``.
        random: With ``sample_privacy``, draws which rows take part, dropout masks and noise; None = from the operating
            system's entropy. A generator that the server can build gives no privacy: it is for tests and for runs
            that only simulate it. Without ``sample_privacy`` nothing is drawn from it.
        signs: -1 or 1 for each value of the adapter, in its order: after every step, a trained value that has moved
            against its sign is back where it began. None = values are free. Not with ``sample_privacy``.
    """

    partition_id: int
    rows: Sequence[Encoded]
    adapter: np.ndarray
    spec: AdapterSpec
    seed: int
    trained: tuple[str, ...] = ()
    row_weights: np.ndarray | None = None
    random: np.random.Generator | None = None
    signs: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What one client did. Sample-level privacy covers the adapter, and none of the other fields.

    Attributes:
        partition_id: The client.
        adapter: As in the job, flat float32; the start values if there was an error.
        first_loss: Loss of the first step, before any update, in nats per label token; rows weighted. With
            ``sample_privacy`` the mean of its rows' own, and that of the first step which had rows.
        loss: Mean loss of the steps; like ``first_loss`` not a number if there was none.
        num_examples: Rows trained on: the client's weight.
        steps: Optimizer steps done.
        tokens: Input tokens read in all steps, neither padding nor soft tokens counted.
        cpu_seconds: CPU time, divided by tokens among clients that trained together.
        error: Why the client has no result, or empty.
        releases: With ``sample_privacy``, what the adapter has cost; None without, or if there was an error.
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
    releases: Releases | None = None


def problem_of(job: ClientJob) -> str:
    """Why a client cannot begin to train, or nothing."""
    if not any(len(row.targets) for row in job.rows):
        return f"expected rows with label tokens, got none in {len(job.rows)} rows"
    weights = job.row_weights
    if weights is None:
        return ""
    if weights.shape != (len(job.rows),):
        return (
            f"row weights: expected one for each of {len(job.rows)} rows, got shape {weights.shape}"
        )
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        return f"row weights: expected finite numbers >= 0, got {weights[wrong][0]}"
    return ""


def labelled(job: ClientJob) -> ClientJob:
    """The client with only the rows that have label tokens."""
    kept = [index for index, row in enumerate(job.rows) if len(row.targets)]
    weights = None if job.row_weights is None else job.row_weights[kept]
    return replace(job, rows=[job.rows[index] for index in kept], row_weights=weights)


def failed(job: ClientJob, reason: str) -> LocalResult:
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
