"""Runs as models that can be asked, and trained on."""

import dataclasses
from collections.abc import Sequence

from clients.base import local_settings
from clients.workspace import Workspace
from fedllm_flwr.averaging import product_of
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, initial_factors
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedLoraConfig, FedPromptConfig
from fedllm_flwr.tasks.encode import Encoded, Encoder
from fedllm_flwr.training.local import ClientJob
from fedllm_flwr.training.local import train as train_jobs


def check_examinable(config: RunConfig) -> None:
    """Refuse runs whose model, or whose rows, cannot be looked at here.

    Raises:
        ConfigError: Names the setting.
    """
    method = config.method
    if config.runtime.name == "deployment":
        raise ConfigError(
            "action=verify and runtime=deployment: the client's rows are on its node, which has to ask; use a run "
            "whose rows are on this machine"
        )
    if not isinstance(method, FedLoraConfig | FedPromptConfig):
        raise ConfigError(
            f"action=verify and method={method.name}: expected fedlora or fedprompt, whose model is an adapter"
        )
    if isinstance(method, FedPromptConfig) and (method.personal_length or method.cluster_length):
        raise ConfigError(
            "action=verify, method.personal_length and method.cluster_length: the model that is attacked is one that "
            "all clients share, use 0"
        )


def adaptation_of(run: RunDirectory, config: RunConfig) -> Adaptation:
    """The model that a run has left in ``adapter/``; LoRA as a frozen update, since ranks may differ."""
    folder = run.path / "adapter"
    if isinstance(config.method, FedPromptConfig):
        prompt = import_prompt(folder)
        return Adaptation(prompt.flat, prompt.spec, fixed_ids=prompt.fixed_ids)
    _, factors = import_peft(folder)
    return Adaptation(delta={name: product_of(layer) for name, layer in factors.items()})


def relearning_job(
    work: Workspace, adaptation: Adaptation, rows: Sequence[Encoded], root: int
) -> ClientJob:
    """Where fine-tuning begins: at the run's prompt, or at a fresh adapter over the run's own that changes nothing."""
    seed = derive_seed(root, "relearn")
    if adaptation.adapter is not None and adaptation.spec is not None:
        return ClientJob(0, rows, adaptation.adapter, adaptation.spec, seed)
    method = work.config.method
    assert isinstance(method, FedLoraConfig)  # noqa: S101  # a prompt's adaptation has an adapter
    spec: LoraSpec = method.server_spec()
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
