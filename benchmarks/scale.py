"""Scale: what a cohort of 10, 25 or 50 of 1,000 clients costs the server, and what each of its clients costs.

The synthetic task with the tiny model and rank-32 adapters on every linear layer (0.24 MB for each client), through
Flower's simulation on Ray with two nodes and two workers; with ``--quick`` in one process over loopback. Each run is a
fresh process, so that its peak memory is its own; repetitions are interleaved, figures are medians. A round is timed
from the draw of its cohort to the new global model; round 1, in which workers still load, is left out.

Peak resident memory is mostly libraries. So the server is also measured alone, in this process: a stub answers for the
clients, ten are in flight, and Python's and NumPy's allocations are traced over two rounds. A server that kept its
replies would show 50 / 10.

The last line is one JSON object:
    server_memory_ratio_50_over_10: peak resident memory of the server's process, cohort 50 over cohort 10; 1 is flat.
    seconds_per_client_ratio_50_over_10: wall seconds of a round divided by its cohort, 50 over 10.
    server_allocations_ratio_50_over_10: peak of the server's own allocations, 50 over 10, ten clients in flight.
    clients: how many clients the federation has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.compose import compose_run
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.models.adapters import AdapterLayout, layer_shapes
from fedllm_flwr.runs.directory import RunDirectory
from strategies import Hosting, build_strategy
from strategies.baselines import Recorder

CLIENTS, COHORTS, NODES, IN_FLIGHT = 1000, (10, 25, 50), 2, 10
WARM_ROUNDS = 1
EVERY_LAYER = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


@dataclass(frozen=True)
class Run:
    """One run's figures.

    Attributes:
        seconds_per_client: Median over its rounds of wall seconds divided by the cohort.
        memory: Peak resident memory of the server's process, bytes.
        reply: Uplink bytes of one client.
    """

    seconds_per_client: float
    memory: float
    reply: float


def overrides(cohort: int, *, clients: int, rounds: int) -> list[str]:
    """The experiment: few rows for each client, evaluated before the first and after the last round only.

    All clients have three rows of 32 tokens: kernels are compiled once for each shape, and shapes are not the question.
    """
    return [
        "experiment=smoke",
        "baselines=none",
        "partition=iid",
        f"partition.num_clients={clients}",
        f"task.train_rows={4 * clients}",
        "task.validation_rows=-1",
        "task.max_tokens=32",
        "partition.max_train_rows_per_client=3",
        f"runtime.num_nodes={NODES}",
        f"num_rounds={rounds}",
        f"evaluate_every={rounds}",
        f"strategy.cohort_fraction={cohort / clients}",
        "method.rank=32",
        f"method.target_modules={EVERY_LAYER}",
    ]


def run_once(cohort: int, *, clients: int, rounds: int, runtime: str) -> Run:
    """One run in fresh processes, from the command line on.

    Raises:
        RuntimeError: The run failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder) / "run"
        command = [
            sys.executable, "-m", "fedllm_flwr", *overrides(cohort, clients=clients, rounds=rounds),
            f"runtime={runtime}", "runtime.dtype=float32", f"out_dir={out_dir}",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cohort {cohort}: exit {done.returncode}: {done.stderr[-800:]}")
        return figures(RunDirectory.open(out_dir).records("round"))


def figures(rounds: Sequence[Mapping[str, Any]]) -> Run:
    """Figures of one run from its round records, which begin with the evaluation before round 1."""
    measured = [r for r in rounds if r["round"] > WARM_ROUNDS]
    seconds = [r["train_seconds"] / len(r["cohort"]) for r in measured]
    replies = [r["uplink_bytes"] / len(r["cohort"]) for r in measured]
    memory = max(r["server_memory_bytes"] for r in rounds)
    return Run(statistics.median(seconds), memory, statistics.median(replies))


def median(runs: Sequence[Run]) -> Run:
    """Each figure's median over repetitions."""
    return Run(
        *(
            statistics.median(getattr(run, name) for run in runs)
            for name in Run.__dataclass_fields__
        )
    )


def stub_client(size: int, message: Message, context: Context) -> Message:
    """Answers for any client with an adapter that was never trained."""
    if message.metadata.message_type == records.DESCRIBE:
        return app(message, context)
    info = {"num-examples": 1, "loss": 1.0, "steps": 1, "tokens": 1, "cpu-seconds": 0.0}
    asked = records.read_body(message)["partition-ids"]
    parts = {f"{p}/adapter": np.full(size, p, dtype=np.float32) for p in asked}
    answer = {"clients": [{"partition-id": p, **info} for p in asked]}
    return Message(records.answer(answer, parts, "float32", len(asked)), reply_to=message)


def server_allocations(cohort: int, *, clients: int, rounds: int = 2) -> int:
    """Peak of what the server allocates over some rounds of training, bytes; see the module's description."""
    settings = [
        *overrides(cohort, clients=clients, rounds=rounds),
        f"runtime.clients_per_wave={IN_FLIGHT}",
    ]
    config = compose_run(settings).config
    shapes = layer_shapes(config.model.ref(""), config.method.target_modules)
    size = AdapterLayout(shapes, config.method.rank).size
    grid = LoopbackGrid(lambda message, context: stub_client(size, message, context), 1)
    recorder = Recorder(lambda text: None)
    hosting = Hosting(grid, 10.0, lambda text: None, recorder.count)
    hosting.refresh()
    strategy = build_strategy(config, hosting, recorder, task_kind="classification")
    strategy.evaluated_splits = ()
    tracemalloc.start()
    try:
        strategy.start(grid)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="loopback, one repetition, 4 rounds")
    quick = parser.parse_args().quick
    runtime, repetitions, rounds = ("loopback", 1, 4) if quick else ("simulation", 3, 10)

    runs: dict[int, list[Run]] = {cohort: [] for cohort in COHORTS}
    for repetition in range(repetitions):
        for cohort, found in runs.items():
            found.append(run_once(cohort, clients=CLIENTS, rounds=rounds, runtime=runtime))
            print(
                f"# {repetition + 1} of {repetitions}, cohort {cohort}: {found[-1]}",
                file=sys.stderr,
            )
    allocated = {cohort: server_allocations(cohort, clients=CLIENTS) for cohort in COHORTS}

    medians = {cohort: median(found) for cohort, found in runs.items()}
    print(
        f"{CLIENTS:,} clients on {NODES} nodes, {runtime}, {medians[50].reply / 1e6:.2f} MB a reply"
    )
    print(f"{'cohort':>6}{'ms / client':>13}{'peak memory, MB':>17}{'own allocations, MB':>21}")
    for cohort, run in medians.items():
        print(
            f"{cohort:6}{run.seconds_per_client * 1e3:13.1f}{run.memory / 1e6:17.1f}"
            f"{allocated[cohort] / 1e6:21.2f}"
        )
    few, many = medians[10], medians[50]
    figures_of_all = {
        "server_memory_ratio_50_over_10": round(many.memory / few.memory, 3),
        "seconds_per_client_ratio_50_over_10": round(
            many.seconds_per_client / few.seconds_per_client, 3
        ),
        "server_allocations_ratio_50_over_10": round(allocated[50] / allocated[10], 3),
        "clients": CLIENTS,
    }
    print(json.dumps(figures_of_all))


if __name__ == "__main__":
    main()
