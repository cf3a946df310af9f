"""``selection=best_validation``: the round that is best on validation rows is the result, also after a resume."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import core, records
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]
SHAKY = ("selection=best_validation", "num_rounds=4", "evaluate_every=1", "optimizer.learning_rate=0.2", "seed=2",
         "keep_checkpoints=9", "task.validation_rows=40")  # fmt: skip
"""A rate that is too high, so that the last round is not the best."""


class Ran:
    """A run, and where it is."""

    def __init__(self, grid: Any, config: Any, out_dir: Path) -> None:
        self.config, self.out_dir = config, out_dir
        self.summary = core.run(grid, config, out_dir)
        self.directory = RunDirectory.open(out_dir)


@pytest.fixture(scope="module")
def selected(micro: Fixture, edge_grid: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(edge_grid(), micro(*SHAKY), tmp_path_factory.mktemp("select") / "run")


def best_round(run: RunDirectory) -> int:
    scores = [record["validation_accuracy"] for record in run.records("round")]
    return int(np.argmax(scores))


def test_the_best_round_on_validation_rows_is_the_result(selected: Ran) -> None:
    best = best_round(selected.directory)
    assert 0 < best < 4, "the choice would prove nothing"
    record = selected.directory.records("round")[best]
    assert selected.summary["selected_round"] == best
    assert all(
        selected.summary[name] == record[name]
        for name in ("accuracy", "loss", "validation_accuracy")
    )
    arrays = checkpoint_of(selected, best).arrays
    wanted = {name: arrays[name] for name in ("adapter", "delta")}
    assert selected.summary["adapter_sha256"] == records.arrays_sha256(wanted)
    _, exported = import_peft(selected.out_dir / "adapter")
    flat = np.concatenate(
        [np.ravel(side) for f in exported.values() for side in (f.lora_a, f.lora_b)]
    )
    np.testing.assert_array_equal(flat, wanted["adapter"])


def checkpoint_of(ran: Ran, server_round: int) -> checkpoints.Checkpoint:
    """A checkpoint by its round, alone in a folder."""
    folder = ran.out_dir.parent / f"only-{server_round}"
    if not folder.exists():
        name = f"round-{server_round:04d}"
        shutil.copytree(ran.out_dir / "checkpoints" / name, folder / name)
    found = checkpoints.latest(folder)
    assert found is not None
    return found


def test_a_resumed_run_selects_the_same_round(
    selected: Ran, edge_grid: Fixture, tmp_path: Path
) -> None:
    for last in (best_round(selected.directory) - 1, 3):
        folder = tmp_path / str(last)
        shutil.copytree(selected.out_dir, folder)
        (folder / "summary.json").unlink()
        for later in range(last + 1, 5):
            shutil.rmtree(folder / "checkpoints" / f"round-{later:04d}")
        again = Ran(edge_grid(), selected.config, folder)
        assert again.summary["selected_round"] == selected.summary["selected_round"]
        assert again.summary["adapter_sha256"] == selected.summary["adapter_sha256"]


def test_a_best_round_that_is_damaged_is_said(
    selected: Ran, edge_grid: Fixture, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(selected.out_dir, folder)
    best = best_round(selected.directory)
    shutil.rmtree(folder / "best" / f"round-{best:04d}")
    with pytest.raises(RunStoppedError, match=f"round {best} was best on validation rows"):
        core.run(edge_grid(), selected.config, folder)
