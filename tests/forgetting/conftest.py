"""Finished runs that clients are taken out of, and the runs that the results have to equal."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.odd_client import odd_rows, overrides
from fedllm_flwr.actions import run_experiment
from fedllm_flwr.compose import compose_run
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]
LATE = (
    "experiment=smoke", "task.train_rows=48", "task.validation_rows=8", "task.test_rows=24", "partition=iid",
    "partition.num_clients=6", "client.local_epochs=0", "client.local_steps=2", "client.batch_size=4",
    "optimizer.learning_rate=0.02", "baselines=none", "num_rounds=3", "evaluate_every=3",
    "strategy.cohort_fraction=0.5", "runtime.node_wait_seconds=5", "method.rank=2", "method.alpha=4",
    "method.target_modules=[q_proj,v_proj]",
)  # fmt: skip
"""Three rounds of three clients of six: with seed 1 these are 2 4 5, 0 4 5 and 0 2 3."""

SIFT = (
    "num_rounds=1",
    "strategy=sift_merge",
    "strategy.cohort_fraction=1.0",
    "method.sharing=b_only",
)
CASES = {
    "ledger": ("unlearning=ledger", "seed=1"),
    "adam": ("unlearning=ledger", "seed=1", "strategy.server_optimizer=fedadam", "strategy.server_learning_rate=0.01"),
    "plain": (),
    "sift": SIFT,
    "sift_ledger": (*SIFT, "unlearning=ledger"),
    "shards": ("unlearning=shards", "strategy.cohort_fraction=1.0"),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDirectory]:
    """A run of a case, with further overrides, as the command line leaves it."""

    @cache
    def run(case: str, *more: str) -> RunDirectory:
        folder = tmp_path_factory.mktemp(case) / "run"
        overrides = [*LATE, *CASES[case], *more]
        run_experiment(compose_run(overrides).config, overrides, str(folder))
        return RunDirectory.open(folder)

    return run


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[RunDirectory, Path]]:
    """A run with a client that can be told from held-out rows like its own, and the file with the rows."""

    @cache
    def run() -> tuple[RunDirectory, Path]:
        folder = tmp_path_factory.mktemp("odd")
        odd_rows(folder / "rows.csv")
        settings = overrides(folder / "rows.csv")
        run_experiment(compose_run(settings).config, settings, str(folder / "run"))
        return RunDirectory.open(folder / "run"), folder / "rows.csv"

    return run


@pytest.fixture
def copied(made: Fixture, tmp_path: Path) -> Callable[..., RunDirectory]:
    """A copy of a run, for a test that spoils it."""

    def copy(case: str) -> RunDirectory:
        shutil.copytree(made(case).path, tmp_path / case)
        return RunDirectory.open(tmp_path / case)

    return copy


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (p for p in sorted(folder.rglob("*")) if p.is_file())
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    return read
