import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import core
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation import evaluate_run
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]


@pytest.mark.parametrize("ranks", ["", "method.client_ranks=[1,4]"])
@pytest.mark.parametrize("rule", ["factor_mean", "stack", "residual"])
def test_the_exported_adapter_has_the_accuracy_of_the_summary(
    rule: str, ranks: str, micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    settings = [
        "num_rounds=2",
        "evaluate_every=2",
        "task.test_rows=40",
        "optimizer.learning_rate=0.02",
    ]
    config = micro(f"strategy={rule}", *settings, *([ranks] if ranks else []))
    summary = core.run(edge_grid(), config, tmp_path / "run")
    found = evaluate_run(RunDirectory.open(tmp_path / "run"), None)
    assert found["run"] == str(tmp_path / "run")
    assert found["test_rows"] == 40
    # The adapter is evaluated as a carried update instead of as factors, and the rows in other batches: rounding.
    assert found["accuracy"] == pytest.approx(summary["accuracy"], abs=1 / 40)
    assert found["loss"] == pytest.approx(summary["loss"], rel=1e-4)


def test_the_exported_model_has_the_accuracy_of_the_summary(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("method=fedgrass", "num_rounds=2", "evaluate_every=2", "task.test_rows=40")
    summary = core.run(edge_grid(), config, tmp_path / "run")
    found = evaluate_run(RunDirectory.open(tmp_path / "run"), None)
    assert found["accuracy"] == pytest.approx(summary["accuracy"], abs=1 / 40)
    assert found["loss"] == pytest.approx(summary["loss"], rel=1e-4)


def test_a_run_that_left_no_adapter_is_refused(
    micro: Fixture, play: Fixture, tmp_path: Path
) -> None:
    played = play(micro("num_rounds=1"))
    with pytest.raises(
        ConfigError, match=r"expected a finished run with adapter/, found none; resume it first"
    ):
        evaluate_run(played.run, None)
    folder = shutil.copytree(played.run.path, tmp_path / "copy")
    assert not (folder / "adapter").exists()
