"""Fine-tune a run's model a little on some of a client's rows, to see how fast what was forgotten comes back."""

import dataclasses
from collections.abc import Sequence

from clients.base import local_settings
from clients.workspace import Workspace
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.models.adapters import AdapterLayout, initial_factors
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedLoraConfig
from fedllm_flwr.tasks.encode import Encoded, Encoder
from fedllm_flwr.training.jobs import ClientJob
from fedllm_flwr.training.local import train as train_jobs


def relearning_job(
    work: Workspace, model: Adaptation, rows: Sequence[Encoded], root: int
) -> ClientJob:
    """Where fine-tuning begins: at the run's prompt, or at a fresh adapter over the run's own that changes nothing.

    Args:
        work: The run.
        model: What it has added to the frozen model.
        rows: What is trained on.
        root: Of the seeds for the order of rows and for a fresh adapter.
    """
    seed = derive_seed(root, "relearn")
    if model.adapter is not None and model.spec is not None:
        return ClientJob(0, rows, model.adapter, model.spec, seed)
    method = work.config.method
    assert isinstance(method, FedLoraConfig)  # noqa: S101  # a prompt's model has an adapter
    spec = method.server_spec()
    first = AdapterLayout(work.shapes, spec.rank).pack(initial_factors(work.shapes, spec, seed))
    return ClientJob(0, rows, first, spec, seed)


def relearned(
    work: Workspace,
    job: ClientJob,
    model: Adaptation,
    steps: int,
    encoder: Encoder,
    *,
    ascend: bool = False,
) -> ClientJob:
    """The job some steps on, at the run's own rate; the optimizer's state begins anew.

    Args:
        work: The run.
        job: Where it stands.
        model: What the job's adapter is over.
        steps: How many, >= 1.
        encoder: Of the rows.
        ascend: Up the loss instead of down.

    Raises:
        RunStoppedError: Training broke down.
    """
    settings = dataclasses.replace(
        local_settings(work, work.config.optimizer.learning_rate),
        local_steps=steps,
        ascend=ascend,
        proximal_mu=0.0,
    )
    [result] = train_jobs(
        work.backbone,
        [job],
        settings,
        head_token_ids=encoder.head_token_ids,
        delta=model.delta,
        fixed_ids=model.fixed_ids,
    )
    if result.error:
        raise RunStoppedError(f"verification: fine-tuning failed: {result.error}")
    return dataclasses.replace(job, adapter=result.adapter, seed=derive_seed(job.seed, steps))
