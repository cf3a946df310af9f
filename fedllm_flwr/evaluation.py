"""Evaluate what a run left: its exported adapter, on the task's whole test split, without Flower."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from clients.workspace import open_workspace
from fedllm_flwr.averaging import product_of
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import resumed_config, whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.exporting import CONTROLLER_FILE, MODEL_FILE
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.grass import FedGrassConfig
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.training.evaluate import evaluate
from fedllm_flwr.training.full_layers import weights_active
from strategies.tally import Tally


def evaluate_run(directory: RunDirectory, runtime: RuntimeConfig | None) -> dict[str, Any]:
    """Load ``adapter/`` as PEFT or transformers wrote it and evaluate it on every test row.

    Args:
        directory: A finished run.
        runtime: Where to compute; None = as the run did.

    Returns:
        ``run``, ``accuracy`` or ``bits_per_character``, ``loss``, and ``test_rows``.

    Raises:
        ConfigError: The run has left no adapter.
    """
    folder = exported_folder(directory)
    config = resumed_config(directory, runtime)
    work = open_workspace(whole_json(config))
    encoder = work.encoder()
    with exported_model(config, folder, work.backbone) as model:
        sums = evaluate(
            work.backbone,
            encoder.encode(work.task.splits["test"]),
            head_token_ids=encoder.head_token_ids,
            label_token_ids=encoder.label_token_ids,
            **model,
        )
    tally = Tally(**dataclasses.asdict(sums))
    return {
        "run": str(directory.path),
        **tally.figures(work.task.kind),
        "test_rows": len(work.task.splits["test"]),
        **_reservations(config),
    }


def exported_folder(directory: RunDirectory) -> Path:
    """Where a finished run has left its model.

    Raises:
        ConfigError: It has left none, or one that works only between clients and a server.
    """
    folder = directory.path / "adapter"
    if (folder / CONTROLLER_FILE).exists():
        raise ConfigError(
            f"{directory.path}: its controller works between clients and a server, expected an adapter or a prompt; "
            "the run's own report has its figures"
        )
    if not any((folder / name).exists() for name in ("adapter_config.json", MODEL_FILE)):
        raise ConfigError(
            f"{directory.path}: expected a finished run with adapter/, found none; resume it first"
        )
    return folder


@contextmanager
def exported_model(config: RunConfig, folder: Path, backbone: Backbone) -> Iterator[dict[str, Any]]:
    """Read what a run has left, and have the backbone compute with it.

    Args:
        config: Of the run.
        folder: Its ``adapter/``.
        backbone: Its model.

    Yields:
        The arguments by which :mod:`fedllm_flwr.training.evaluate` computes with it.
    """
    if isinstance(config.method, FedPromptConfig):
        prompt = import_prompt(folder)
        yield {"adapter": prompt.flat, "spec": prompt.spec, "fixed_ids": prompt.fixed_ids}
    elif isinstance(config.method, FedGrassConfig):
        weights = _exported_weights(folder, backbone, config.method.target_modules)
        with weights_active(backbone, weights):
            yield {}
    else:
        _, factors = import_peft(folder)
        # as a delta, since ranks may differ between layers
        yield {"delta": {name: product_of(layer) for name, layer in factors.items()}}


def _exported_weights(
    folder: Path, backbone: Backbone, target_modules: tuple[str, ...]
) -> dict[str, Tensor]:
    """The trained matrices of an exported model, [o, i] by layer."""
    found = {}
    with safe_open(folder / MODEL_FILE, framework="pt") as file:
        for name, layer in backbone.target_layers(target_modules).items():
            stored = file.get_tensor(f"{name}.weight").to(backbone.device, backbone.dtype)
            found[name] = stored.t() if isinstance(layer, Conv1D) else stored
    return found


def _reservations(config: RunConfig) -> dict[str, str]:
    """What of a run its export does not have, so that figures are not mistaken for the run's own."""
    missing = []
    if isinstance(config.method, FedPromptConfig):
        missing += ["personal prompts"] if config.method.personal_length else []
        missing += ["the prompts of clusters"] if config.method.cluster_length else []
    missing += (
        ["the clients' own names of labels"] if config.partition.label_conventions > 1 else []
    )
    return {"without": ", ".join(missing)} if missing else {}
