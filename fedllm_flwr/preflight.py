"""What can be wrong with a run that its configuration alone does not show: device, sizes of the model, data, groups."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.base import BaseRule
from fedllm_flwr.models.kernels import choose
from fedllm_flwr.models.quantized import check_package
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.models.soft import check_window
from fedllm_flwr.models.tokenizers import load_tokenizer
from fedllm_flwr.reservoir import Reservoir
from fedllm_flwr.runs.tracking import mlflow_client
from fedllm_flwr.settings.grass import FedGrassConfig
from fedllm_flwr.settings.methods import FedPromptConfig, FedResPromptConfig
from fedllm_flwr.tasks.base import SPLITS, Task
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.tasks.partitions import ClientRows, partition
from fedllm_flwr.tasks.series_tasks import parse_series
from strategies.fedprompt import NAME_LENGTH, first_parts
from strategies.ledger import check_budget
from strategies.row_ledger import check_row_budget


def preflight(config: RunConfig) -> None:
    """Find what is wrong with a run before a model loads, a process starts or a file is written.

    Checks the device, the ranks against the layers, the data, the partition, and MLflow if it is asked for. A
    deployment's data and devices are its nodes' own and its ServerApp is elsewhere, so there only the model is checked,
    and the device if the server computes with it.

    Raises:
        ConfigError: One line that says what was expected and what was given.
    """
    if config.runtime.name != "deployment" or isinstance(config.method, FedResPromptConfig):
        check_package(config.model.quantization)
        runtime, tokens = config.runtime, config.task.max_tokens
        choose(dtype=runtime.dtype, device=runtime.device, max_tokens=tokens)
    _check_method(config)
    check_budget(config)
    if config.runtime.name != "deployment":
        if config.runtime.mlflow:
            mlflow_client()
        task = load_task(config.task.options(config.runtime.data_path), config.rows_seed)
        if config.task.loss == "labels" and task.kind != "classification":
            raise ConfigError(
                f"task.loss=labels and task={config.task.name}: the rows have no labels, use task.loss=vocabulary"
            )
        task.template(config.task.template)
        clients = partition(task, config.partition, config.rows_seed)
        check_groups(config, task, clients)
        check_row_budget(config, [len(client.train) for client in clients])
        _check_words(config, task)
        _check_series(config, task, clients)


def check_out_dir(out_dir: Path) -> None:
    """Find out whether a run directory can be written, without writing.

    Raises:
        ConfigError: A file is in its way, or the folder that it would be made in is not writable.
    """
    place = out_dir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"out_dir: expected a folder that can be written, got {out_dir} ({place} is "
            f"{'not writable' if place.is_dir() else 'a file'})"
        )


def _check_method(config: RunConfig) -> None:
    """Hold what is trained against the model's sizes."""
    ref, method = config.model.ref(config.runtime.model_path), config.method
    if isinstance(method, FedPromptConfig):
        check_window(ref, method.spec().length, config.task.max_tokens)
        first_parts(config)
        return
    if isinstance(method, FedResPromptConfig):
        text_tokens = 0 if method.server_text == "none" else config.task.max_tokens
        check_window(ref, method.length, text_tokens)
        return
    is_grass = isinstance(method, FedGrassConfig) and method.trainer == "grass"
    if isinstance(method, FedGrassConfig) and method.eight_bit:
        BaseRule(name="adam8bit")
    ranks = (method.rank, *(() if isinstance(method, FedGrassConfig) else method.client_ranks))
    for shape in layer_shapes(ref, method.target_modules):
        width = shape.out_features if is_grass else shape.width
        for rank in ranks:
            if rank > width:
                raise ConfigError(
                    f"method.rank: expected at most {width}, the width of layer {shape.name}, got {rank}"
                )


def _check_words(config: RunConfig, task: Task) -> None:
    """Hold the question and the label words against the model's tokenizer: both must fit, and words must differ."""
    ref = config.model.ref(config.runtime.model_path)
    build_encoder(
        task,
        load_tokenizer(ref, config.runtime.dtype),
        template=config.task.template,
        loss=config.task.loss,
        max_tokens=config.task.max_tokens,
    )


def _check_series(config: RunConfig, task: Task, clients: Sequence[ClientRows]) -> None:
    """Read every series once, and build the reservoir that is to read them."""
    if not isinstance(config.method, FedResPromptConfig):
        return
    Reservoir(config.method.reservoir(config.seed, task.series_width))
    for row in (r for c in clients for split in SPLITS for r in getattr(c, split)):
        if task.series_width:
            parse_series(row, task.series_width)


def check_groups(config: RunConfig, task: Task, clients: Sequence[ClientRows]) -> None:
    """Hold the groups that a run is fair over, or clustered by, against the rows that the clients hold.

    Raises:
        ConfigError: The data has no groups, no attribute can be inferred, or a group has no row to train on or to test.
    """
    method, chosen = config.method, config.fairness.groups
    if task.kind != "classification" and (
        chosen == "label" or config.fairness.name == "accuracy_gap"
    ):
        raise ConfigError(
            f"fairness={config.fairness.name} fairness.groups={chosen} and task={config.task.name}: expected rows "
            "with labels, got free text"
        )
    if chosen == "inferred" and task.attribute is None:
        raise ConfigError(
            f"fairness.groups=inferred and task={config.task.name}: the task has no attribute to infer, use data, "
            "label, client or random"
        )
    clustered = isinstance(method, FedPromptConfig) and method.cluster_length > 0
    if chosen != "data" and not clustered:
        return
    option = "fairness.groups=data" if chosen == "data" else "method.cluster_length > 0"
    counts = {split: _group_counts(clients, split) for split in ("train", "test")}
    if not counts["train"]:
        raise ConfigError(
            f"{option} and task={config.task.name}: expected rows with groups, got none"
        )
    for name in sorted(set().union(*counts.values())):
        if len(name) > NAME_LENGTH:
            raise ConfigError(
                f"task={config.task.name}: expected groups with names of at most {NAME_LENGTH} characters, got "
                f"{name[:20]!r}… with {len(name)}"
            )
    for split, found in counts.items():
        for name in sorted(set().union(*counts.values()) - set(found)):
            raise ConfigError(
                f"{option} and task={config.task.name}: group {name!r} has no {split} rows, expected at least one"
            )


def _group_counts(clients: Sequence[ClientRows], split: str) -> Counter[str]:
    return Counter(
        row.group for client in clients for row in getattr(client, split) if row.group is not None
    )
