"""MLflow itself is the oracle, with a store in a folder; without it, what its absence is told with."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.tracking import STATE, Tracker, mlflow_client

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
needs_mlflow = pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow-skinny is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MLflow's store is a folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "store"


def run_id(run: RunDirectory) -> str:
    return str(json.loads((run.path / STATE).read_text())["run_id"])


def curve(run: RunDirectory, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow_client().get_metric_history(run_id(run), name)]


def stored(run: RunDirectory) -> Any:
    return mlflow_client().get_run(run_id(run))


def test_without_a_server_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="environment variable MLFLOW_TRACKING_URI, got nothing"):
        mlflow_client()


def test_without_the_package_its_name_is_told(
    monkeypatch: pytest.MonkeyPatch, make_run: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'fedllm-flwr\[mlflow\]'"):
        Tracker(make_run(), print)


@needs_mlflow
def test_settings_curves_and_final_figures_come_back(make_run: Any, store: Path) -> None:
    run = make_run()
    tracker = Tracker(run, print)
    tracker.update()
    tracker.ended()
    rounds = [(r["round"], r["accuracy"]) for r in run.records("round")]
    assert curve(run, "accuracy") == rounds
    found = stored(run)
    assert found.info.status == "FINISHED"
    assert found.data.params["method.rank"] == "8"
    assert found.data.tags["fedllm.fingerprint"] == run.manifest["fingerprint"]
    assert found.data.metrics["final/accuracy"] == run.summary()["accuracy"]


@needs_mlflow
def test_a_resumed_run_goes_on_in_its_own(make_run: Any, store: Path) -> None:
    run = make_run(rounds=2, finished=False)
    first = Tracker(run, print)
    first.update()
    first.ended()
    assert stored(run).info.status == "FAILED"
    again = Tracker(run, print)
    assert stored(run).info.status == "RUNNING"
    run.append({"kind": "round", "round": 3, "accuracy": 0.625})
    again.update()
    again.update()
    assert [step for step, _ in curve(run, "accuracy")] == [0, 1, 2, 3], "each round once"


@needs_mlflow
def test_a_server_that_goes_away_costs_a_line_and_gets_the_rounds_later(
    make_run: Any, store: Path
) -> None:
    run, notes = make_run(rounds=1, finished=False), []
    tracker = Tracker(run, notes.append)
    away = store.rename(store.with_name("away"))
    store.write_text("in the way")
    tracker.update()
    assert len(notes) == 1
    assert notes[0].startswith("MLflow did not take the figures: ")
    store.unlink()
    away.rename(store)
    tracker.update()
    assert [step for step, _ in curve(run, "accuracy")] == [0, 1]


@needs_mlflow
def test_a_whole_run_is_told_round_by_round(
    store: Path, tmp_path: Path, edge_grid: Any, smoke: Any
) -> None:
    from fedllm_flwr.core import run

    config = smoke("runtime.mlflow=true", "partition.num_clients=2", "partition=iid", "task.train_rows=8",
                   "task.validation_rows=2", "task.test_rows=4", "client.local_epochs=0", "client.local_steps=1",
                   "num_rounds=2", "baselines=none")  # fmt: skip
    summary = run(edge_grid(2), config, tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    assert [step for step, _ in curve(directory, "accuracy")] == [0, 1, 2]
    assert stored(directory).data.metrics["final/loss"] == summary["loss"]
