"""Evaluate what a run left: its exported adapter, on the task's whole test split, without Flower."""

import dataclasses
from functools import partial
from typing import Any

from clients.workspace import open_workspace
from fedllm_flwr.averaging import product_of
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import resumed_config, whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.exporting import CONTROLLER_FILE
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.training.evaluate import evaluate
from strategies.tally import Tally


def evaluate_run(directory: RunDirectory, runtime: RuntimeConfig | None) -> dict[str, Any]:
    """Load ``adapter/`` as PEFT wrote it and evaluate it on every test row.

    Args:
        directory: A finished run.
        runtime: Where to compute; None = as the run did.

    Returns:
        ``run``, ``accuracy`` or ``bits_per_character``, ``loss``, and ``test_rows``.

    Raises:
        ConfigError: The run has left no adapter.
    """
    folder = directory.path / "adapter"
    if (folder / CONTROLLER_FILE).exists():
        raise ConfigError(
            f"{directory.path}: its controller works between clients and a server, expected an adapter or a prompt; "
            "the run's own report has its figures"
        )
    if not (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{directory.path}: expected a finished run with adapter/, found none; resume it first"
        )
    config = resumed_config(directory, runtime)
    work = open_workspace(whole_json(config))
    encoder = work.encoder()
    rows = encoder.encode(work.task.splits["test"])
    measure = partial(
        evaluate,
        work.backbone,
        rows,
        head_token_ids=encoder.head_token_ids,
        label_token_ids=encoder.label_token_ids,
    )
    if isinstance(config.method, FedPromptConfig):
        prompt = import_prompt(folder)
        sums = measure(adapter=prompt.flat, spec=prompt.spec, fixed_ids=prompt.fixed_ids)
    else:
        _, factors = import_peft(folder)
        # as a delta, since ranks may differ between layers
        sums = measure(delta={name: product_of(layer) for name, layer in factors.items()})
    tally = Tally(**dataclasses.asdict(sums))
    return {
        "run": str(directory.path),
        **tally.figures(work.task.kind),
        "test_rows": len(work.task.splits["test"]),
        **_reservations(config),
    }


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
