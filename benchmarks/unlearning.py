"""Taking one client out of an exact merge, against that client's own training and against training the others anew.

    python benchmarks/unlearning.py [--quick] [--model tiny|smollm2_135m]

N clients with 16 rows each train LoRA's B under fixed signs for 4 steps and merge once (`strategy=sift_merge`). One of
them leaves: its update is trained again from its rows, compared with the digest that was kept, and taken out of the
sum (`fedllm_flwr.forgetting.models.exactly_merged`, which `action=unlearn` calls). Named baselines: the client's own
training in the run, as it told it; and training the N - 1 others through the same strategy and messages, without
evaluation.

Costs are CPU seconds of this process on one thread, with the model loaded before; reading the checkpoint and making the
new model are part of the removal. The median of several removals; the baselines run once, in the same run.

The last line is one JSON object:
    removal_vs_client_50: removal / the mean client's own training, of 50 clients.
    retrain_vs_removal_10, retrain_vs_removal_50, retrain_vs_removal_200: training the others anew / removal.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fedllm_flwr.actions import run_experiment
from fedllm_flwr.client_app import app
from fedllm_flwr.compose import compose_run
from fedllm_flwr.forgetting.models import exactly_merged
from fedllm_flwr.forgetting.request import Request, read_request
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.runs.directory import RunDirectory
from strategies import Hosting, build_strategy
from strategies.baselines import Recorder

CLIENTS, QUICK_CLIENTS = (10, 50, 200), (10, 50)
ROWS = 16
LEAVING = 3
REPEATS = 5
GATES: dict[str, tuple[str, float]] = {
    "removal_vs_client_50": ("<=", 2.0),
    "retrain_vs_removal_50": (">=", 10.0),
}


def merged_run(clients: int, model: str, folder: Path) -> Request:
    """A finished run, and the request of one of its clients to leave."""
    rows = clients * ROWS
    overrides = [
        "experiment=unlearn_smoke", "strategy=sift_merge", "num_rounds=1", "strategy.cohort_fraction=1.0",
        "unlearning=none", f"model={model}", f"partition.num_clients={clients}", f"task.train_rows={rows}",
        f"task.validation_rows={clients}", f"task.test_rows={clients}", "runtime.threads=1",
        "client.local_epochs=0", "client.local_steps=4", "client.batch_size=4",
    ]  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        run_experiment(compose_run(overrides).config, overrides, str(folder))
    return read_request(RunDirectory.open(folder), str(LEAVING), "exact_merge")


def removal_seconds(request: Request) -> float:
    """Median CPU seconds of a removal, after one to warm up."""
    found = []
    for _ in range(REPEATS + 1):
        began = time.process_time()
        exactly_merged(request)
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def own_seconds(request: Request) -> float:
    """Mean CPU seconds of a client's training in the run, as the clients told them."""
    told = [float(record["cpu_seconds"]) for record in request.source.records("client")]
    return statistics.mean(told)


def retrain_seconds(request: Request) -> float:
    """CPU seconds of training the others anew."""
    config, recorder = request.new_config(), Recorder(print)
    grid = LoopbackGrid(app, min(config.runtime.num_nodes, config.partition.num_clients))  # type: ignore[arg-type]
    hosting = Hosting(grid, config.runtime.node_wait_seconds, print, recorder.count)
    hosting.refresh()
    strategy = build_strategy(config, hosting, recorder, task_kind="classification")
    strategy.evaluated_splits = ()
    began = time.process_time()
    strategy.start(grid)
    return time.process_time() - began


def figures_of(sizes: tuple[int, ...], model: str) -> dict[str, float]:
    """Everything that the last line holds; sizes that were not asked for are absent."""
    figures = {}
    print(f"{'clients':>8}{'removal ms':>12}{'own training ms':>17}{'retraining ms':>15}")
    for clients in sizes:
        with tempfile.TemporaryDirectory() as folder:
            request = merged_run(clients, model, Path(folder) / "run")
            removal, own = removal_seconds(request), own_seconds(request)
            again = retrain_seconds(request)
        print(f"{clients:8}{removal * 1e3:12.1f}{own * 1e3:17.1f}{again * 1e3:15.1f}")
        if clients == 50:
            figures["removal_vs_client_50"] = removal / own
        figures[f"retrain_vs_removal_{clients}"] = again / removal
    return figures


def main() -> None:
    """Measure, print, and say where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without 200 clients")
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = figures_of(QUICK_CLIENTS if options.quick else CLIENTS, options.model)
    for name, (sign, bound) in GATES.items():
        holds = figures[name] <= bound if sign == "<=" else figures[name] >= bound
        print(f"{name}: {figures[name]:.3g}, gate {sign} {bound:g}: {'ok' if holds else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
