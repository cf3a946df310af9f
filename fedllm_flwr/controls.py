"""Baselines that belong to one method or one task: a linear classifier on reservoir states, the last value of a series.

The first reads all clients' rows in one place, which only a simulation can; its record says so.
"""

from collections.abc import Sequence

import numpy as np

from clients.contexts import Contexts
from clients.workspace import Workspace
from fedllm_flwr.config import RunConfig
from fedllm_flwr.journal import Journal
from fedllm_flwr.records import POOLED
from fedllm_flwr.reservoir.linear import logistic_on_states
from fedllm_flwr.settings.methods import FedResPromptConfig
from fedllm_flwr.tasks.base import Row, Split
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.metrics import accuracies, count_correct, pooled
from fedllm_flwr.tasks.partitions import partition
from fedllm_flwr.tasks.series_tasks import last_value_classes
from strategies.tally import client_figures

LOGISTIC, PERSISTENCE = "logistic_on_states", "persistence"


def control_baselines(config: RunConfig, journal: Journal) -> None:
    """Add those that the run's method and task have and its records lack.

    Args:
        config: The run; not a deployment, since the rows are read here.
        journal: Of the run.
    """
    there = {record["name"] for record in journal.run.records("baseline")}
    options = config.task.options(config.runtime.data_path)
    task = load_task(options, config.rows_seed)
    work = Workspace(config, task, partition(task, config.partition, config.rows_seed))
    tests = [client.test for client in work.clients]
    if isinstance(config.method, FedResPromptConfig) and LOGISTIC not in there:
        predicted, inverse = _logistic(work)
        detail = f"on all clients' states in one place (simulation only), C {inverse:g}"
        _add(journal, LOGISTIC, predicted, tests, detail)
    if task.name == "mackey_glass" and PERSISTENCE not in there:
        predicted = [last_value_classes(options, config.rows_seed, rows) for rows in tests]
        _add(journal, PERSISTENCE, predicted, tests, "the class of the last value of the context")


def _logistic(work: Workspace) -> tuple[list[np.ndarray], float]:
    contexts, pool = Contexts(work), work.rows(POOLED)

    def labelled(split: Split) -> tuple[np.ndarray, np.ndarray]:
        return contexts.states(POOLED, split).numpy(), _labels(getattr(pool, split))

    tests = [contexts.states(own.partition_id, "test").numpy() for own in work.clients]
    return logistic_on_states(labelled("train"), labelled("validation"), tests)


def _add(
    journal: Journal,
    name: str,
    predicted: Sequence[np.ndarray],
    tests: Sequence[Sequence[Row]],
    detail: str,
) -> None:
    clients = [
        count_correct(own, _labels(rows)) for own, rows in zip(predicted, tests, strict=True)
    ]
    found = {"accuracy": pooled(clients).accuracy, **client_figures(accuracies(clients))}
    journal.run.append({"kind": "baseline", "name": name, **found, "detail": detail})


def _labels(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.label for row in rows], dtype=np.int64)
