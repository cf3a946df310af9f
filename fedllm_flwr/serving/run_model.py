"""The model that a run directory holds, ready to be asked."""

from collections.abc import Callable, Sequence
from typing import Any

from fedllm_flwr.averaging import product_of
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import resumed_config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models import backbone as backbones
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.models.generation import Adaptation, Generator
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.serving.answering import SingleModel
from fedllm_flwr.serving.rendering import Turn, encode_chat, encode_task
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.settings.serving import ServingConfig
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.prompts import Prompt

Encode = Callable[[Sequence[Turn], Any], list[int]]


def open_run_model(
    directory: RunDirectory, runtime: RuntimeConfig | None, serving: ServingConfig
) -> SingleModel:
    """Load the model of a run with what the run has exported.

    Args:
        directory: A finished run.
        runtime: Where to compute; None = as the run did.
        serving: How prompts are made, and how long they may be.

    Returns:
        The model, under the name of the run's folder.

    Raises:
        ConfigError: The run has left no adapter, or its prompt stands behind the task's question and
            ``serving.prompt`` would put other text there.
    """
    config = resumed_config(directory, runtime)
    adaptation = _adaptation(directory, config)
    if adaptation.leading_ids and serving.prompt != "task":
        raise ConfigError(
            f"{directory.path}: its prompt stands behind the question of task {config.task.name}, expected "
            f"serving.prompt=task, got {serving.prompt}"
        )
    backbone = backbones.load(
        config.model.ref(config.runtime.model_path),
        dtype=config.runtime.dtype,
        device=config.runtime.device,
        threads=config.runtime.threads,
        max_tokens=serving.max_context_tokens,
    )
    encode = encode_chat if serving.prompt == "chat" else _task_encoder(config)
    return SingleModel(
        directory.path.resolve().name,
        Generator(backbone, adaptation),
        encode,
        max_context_tokens=serving.max_context_tokens,
    )


def _adaptation(directory: RunDirectory, config: RunConfig) -> Adaptation:
    """What :func:`fedllm_flwr.evaluation.evaluate_run` computes with."""
    folder = directory.path / "adapter"
    if not (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{directory.path}: expected a finished run with an adapter or a prompt in adapter/, found none"
        )
    if isinstance(config.method, FedPromptConfig):
        prompt = import_prompt(folder)
        return Adaptation(prompt.flat, prompt.spec, fixed_ids=prompt.fixed_ids)
    _, factors = import_peft(folder)
    return Adaptation(delta={name: product_of(layer) for name, layer in factors.items()})


def _task_encoder(config: RunConfig) -> Encode:
    """Chats of one user turn as rows of the run's task."""
    task = load_task(config.task.options(config.runtime.data_path), config.rows_seed)
    template = task.template(config.task.template)

    def encode(turns: Sequence[Turn], tokenizer: Any) -> list[int]:
        return encode_task(turns, Prompt(template, tokenizer))

    return encode
