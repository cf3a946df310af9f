"""A run that is killed with -9 at any moment, ten times over, ends with the hash of an undisturbed one."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm_flwr import core
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]
KILLS = 10
SEED = 20


def carry(config: Any, edge_grid: Any, out_dir: Path) -> None:
    """What a process does that is started with the command line: run, or go on with, a run directory."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - the process ends with it
    torch.set_num_threads(1)
    core.run(edge_grid(), config, out_dir)


@pytest.fixture
def start(edge_grid: Fixture, micro: Fixture) -> Callable[..., Any]:
    """Start a process that carries a run; a fork, because importing everything anew takes longer than the run."""
    context = multiprocessing.get_context("fork")

    def started(config: Any, out_dir: Path) -> Any:
        process = context.Process(target=carry, args=(config, edge_grid, out_dir))
        process.start()
        return process

    return started


def left_by(out_dir: Path) -> tuple[str, list[int], list[str]]:
    """What must not depend on how often a run was killed: hash, rounds, and each client's figures."""
    run = RunDirectory.open(out_dir)
    figures = [
        f"{c['round']} {c['partition_id']} {c['loss']} {c['num_examples']}"
        for c in run.records("client")
    ]
    return run.summary()["adapter_sha256"], [r["round"] for r in run.records("round")], figures


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(
    start: Fixture, edge_grid: Fixture, micro: Fixture, tmp_path: Path
) -> None:
    config = micro(
        "num_rounds=6", "evaluate_every=3", "strategy=residual", "selection=best_validation"
    )
    core.run(edge_grid(), config, tmp_path / "undisturbed")  # so that forks find all loaded
    expected = left_by(tmp_path / "undisturbed")
    assert expected[1] == list(range(7))
    began = time.monotonic()
    start(config, tmp_path / "timed").join()
    seconds = time.monotonic() - began
    assert left_by(tmp_path / "timed") == expected
    moments = random.Random(SEED)
    killed, finished, resumed = 0, 0, set()
    while killed < KILLS or not finished:
        process = start(config, tmp_path / "run")
        process.join(moments.uniform(0, seconds) if killed < KILLS else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            continue
        assert process.exitcode == 0
        assert left_by(tmp_path / "run") == expected, f"after {killed} kills"
        resumed.add(RunDirectory.open(tmp_path / "run").summary()["resumed_rounds"])
        finished += 1
        shutil.rmtree(tmp_path / "run")
    assert resumed - {0}, "no kill fell into the rounds"
