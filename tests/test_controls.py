"""Baselines of one method or task, in the records of a run."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.controls import control_baselines
from fedllm_flwr.core import open_or_create, run
from fedllm_flwr.journal import Journal
from fedllm_flwr.reservoir.series import mackey_glass, quantile_edges, windows
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.seeding import derive_seed

Fixture = Callable[..., Any]
MACKEY = ("task=mackey_glass", "task.train_rows=60", "task.test_rows=100", "partition=iid",
          "partition.num_clients=2", "method.reservoir_size=40")  # fmt: skip


@pytest.fixture
def baselines(micro: Fixture, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """The records of a configuration's control baselines by name, asked for twice."""

    def found(*overrides: str) -> dict[str, dict[str, Any]]:
        config = micro(*overrides)
        journal = Journal(open_or_create(config, tmp_path / "run"), config, Progress(StringIO()))
        control_baselines(config, journal)
        control_baselines(config, journal)
        records = journal.run.records("baseline")
        assert len({r["name"] for r in records}) == len(records), "none is added twice"
        return {record["name"]: record for record in records}

    return found


def test_persistence_is_that_of_the_series(baselines: Fixture, micro: Fixture) -> None:
    found = baselines("method=fedresprompt", *MACKEY)
    seed = micro("method=fedresprompt", *MACKEY).seed
    train = windows(mackey_glass(1230, derive_seed(seed, "mackey_glass", "train")), 30)
    contexts, following = windows(mackey_glass(430, derive_seed(seed, "mackey_glass", "test")), 30)
    edges = quantile_edges(train[1], 4)
    classes = np.searchsorted(edges, following, side="right")
    all_rows = np.mean(np.searchsorted(edges, contexts[:, -1, 0], side="right") == classes)
    assert found["persistence"]["accuracy"] == pytest.approx(all_rows, abs=0.1)  # a sample of 100
    assert 0.5 < found["persistence"]["accuracy"] < 1
    assert found["logistic_on_states"]["accuracy"] > 0.6
    assert (
        found["logistic_on_states"]["worst_client_accuracy"]
        <= found["logistic_on_states"]["accuracy"]
    )
    assert "simulation only" in found["logistic_on_states"]["detail"]


def test_states_that_do_not_see_the_rows_are_at_chance(baselines: Fixture) -> None:
    found = baselines("method=fedresprompt", *MACKEY, "method.states=random")
    assert found["logistic_on_states"]["accuracy"] < 0.45


def test_other_methods_and_tasks_have_none(baselines: Fixture) -> None:
    assert baselines() == {}


def test_a_run_has_them_beside_its_result(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("method=fedresprompt", *MACKEY, "num_rounds=1", "baselines.predictors=true")
    summary = run(edge_grid(2), config, tmp_path / "run")
    assert {"persistence_accuracy", "logistic_on_states_accuracy", "majority_accuracy"} <= set(
        summary
    )
