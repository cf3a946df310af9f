"""A message of a deployment with and without the node's daemon.

    python -m benchmarks.deployment [--quick] [--model tiny|smollm2_135m] [--steps N] [--repeats N]

Flower starts a client process for every message. Here a process of the same imports reads one training message of an
experiment (federated LoRA; the demo on SmolLM2-135M, or the smoke experiment on the tiny model), hands it to the
project's ClientApp and writes the reply: once on its own (the named baseline: import torch, load the model, train), and
once with `fedllm daemon` named in the node's facts. Both in turns; the replies must be equal to the bit. Installing the
app and talking to the SuperNode, which Flower does for every message either way, are not in it, nor are the 6 s of
polling in every exchange.

CPU seconds are those of the client process, and of the daemon while it has the message, on one thread; a ratio is that
of the medians. The daemon is warm: its own import and load, and its first message, come before and are printed.

The last line is one JSON object:
    daemon_ratio: CPU seconds of a message without the daemon / with it.
    daemon_wall_ratio: the same of wall time (other programs' load is in it).
    daemon_idle_ratio: CPU seconds without what training itself costs: (without - training) / (with - training), where
        training is what the warm daemon spends on the message.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import ConfigRecord, Context, Message

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.compose import compose_run
from fedllm_flwr.daemon import protocol
from fedllm_flwr.daemon.asking import SOCKET
from fedllm_flwr.daemon.command import READY
from fedllm_flwr.loopback import LoopbackGrid
from strategies import Hosting, build_strategy
from strategies.baselines import Recorder

EXPERIMENTS = {"tiny": "smoke", "smollm2_135m": "r8_demo"}
REPEATS, QUICK_REPEATS = 5, 2
CLIENT = """
import sys
from flwr.supernode.cli import flwr_clientapp  # what Flower imports for every message
from fedllm_flwr.client_app import app
from fedllm_flwr.daemon import protocol

folder = sys.argv[1]
read = lambda name: open(f"{folder}/{name}", "rb").read()
context = protocol.read_context(read("context"))
reply = app(protocol.read_message(read("message")), context)
open(f"{folder}/reply", "wb").write(protocol.message_bytes(reply))
"""
GATES = {"daemon_ratio": 2.0, "daemon_idle_ratio": 5.0}


@dataclass(frozen=True)
class Cost:
    """Of one message: CPU seconds of both processes, the daemon's share of them, and wall seconds."""

    cpu: float
    daemon: float
    wall: float


def training_message(model: str, steps: int) -> tuple[Message, Context]:
    """The first round's message to a node that hosts one client, and the node's context."""
    config = compose_run(
        [f"experiment={EXPERIMENTS[model]}", "baselines=none", "runtime=loopback", "runtime.threads=1",
         "client.local_epochs=0", f"client.local_steps={steps}", "client.batch_size=4"]
    ).config  # fmt: skip
    grid = LoopbackGrid(app, config.partition.num_clients)  # type: ignore[arg-type]
    recorder = Recorder(lambda _: None)
    hosting = Hosting(grid, config.runtime.node_wait_seconds, print, recorder.count)
    hosting.refresh()
    strategy = build_strategy(config, hosting, recorder, task_kind="classification")
    message = next(iter(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)))
    message.metadata.__dict__["_message_id"] = "measured"
    return message, grid.contexts[message.metadata.dst_node_id]


@contextlib.contextmanager
def running_daemon(folder: Path) -> Iterator[tuple[psutil.Process, Path]]:
    """A daemon that is ready, and its socket."""
    path, log = folder / "socket", folder / "daemon.log"
    typed = [sys.executable, "-m", "fedllm_flwr", "daemon", "--socket", str(path)]
    with log.open("w") as output, subprocess.Popen(typed, stderr=output) as process:
        while READY not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        try:
            yield psutil.Process(process.pid), path
        finally:
            process.terminate()


def handled(folder: Path, daemon: psutil.Process | None) -> Cost:
    """What a client process costs that handles the message in a folder."""
    before, began = _seconds(daemon), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", CLIENT, str(folder)])
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    own = _seconds(daemon) - before
    return Cost(usage.ru_utime + usage.ru_stime + own, own, wall)


def _seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def answer_of(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The reply, without its CPU seconds."""
    body, parts = records.read(protocol.read_message((folder / "reply").read_bytes()), records.ANSWER)  # fmt: skip
    for info in body["clients"]:
        del info["cpu-seconds"]
    return body, parts


def check_equal(one: Path, other: Path) -> None:
    """Both sides have computed the same, to the bit."""
    (body, parts), (wanted, values) = answer_of(one), answer_of(other)
    assert body == wanted
    assert not any(info["error"] for info in body["clients"])
    assert parts.keys() == values.keys()
    assert all(np.array_equal(parts[name], values[name]) for name in parts)


def written(folder: Path, message: Message, context: Context, socket: Path | None) -> Path:
    """A new folder with what a client process reads."""
    folder.mkdir(mode=0o700)
    facts = {**context.node_config, **({SOCKET: str(socket)} if socket else {})}
    named = Context(context.run_id, context.node_id, facts, context.state, context.run_config)
    (folder / "message").write_bytes(protocol.message_bytes(message))
    (folder / "context").write_bytes(protocol.context_bytes(named))
    return folder


def measure(message: Message, context: Context, repeats: int) -> dict[str, list[Cost]]:
    """Costs of both sides in turns, after one message to warm up the daemon."""
    found: dict[str, list[Cost]] = {"without": [], "with": []}
    with (
        tempfile.TemporaryDirectory(prefix="fedllm-") as place,
        running_daemon(Path(place)) as (daemon, socket),
    ):
        alone = written(Path(place) / "without", message, context, None)
        asking = written(Path(place) / "with", message, context, socket)
        start, first = _seconds(daemon), handled(asking, daemon)
        print(f"daemon: {start:.2f} CPU s to start, {first.daemon:.2f} for its first message")
        for _ in range(repeats):
            found["without"].append(handled(alone, None))
            found["with"].append(handled(asking, daemon))
            assert found["with"][-1].daemon > 0, "the daemon did the work"
            check_equal(asking, alone)
    return found


def figures_of(costs: dict[str, list[Cost]]) -> dict[str, float]:
    """Everything that the last line holds."""
    cpu, wall = (
        {side: statistics.median(getattr(cost, name) for cost in found) for side, found in costs.items()}
        for name in ("cpu", "wall")
    )  # fmt: skip
    training = statistics.median(cost.daemon for cost in costs["with"])
    print(f"{'a message':<12}{'CPU s':>9}{'wall s':>9}")
    for side in costs:
        print(f"{side:<12}{cpu[side]:9.2f}{wall[side]:9.2f}")
    print(f"of it, the daemon's training: {training:.2f} CPU s")
    return {
        "daemon_ratio": cpu["without"] / cpu["with"],
        "daemon_wall_ratio": wall["without"] / wall["with"],
        "daemon_idle_ratio": (cpu["without"] - training) / (cpu["with"] - training),
    }


def main() -> None:
    """Measure, print, and say where a gate is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model, fewer repeats")
    parser.add_argument("--model", choices=EXPERIMENTS, default="smollm2_135m")
    parser.add_argument("--steps", type=int, default=4, help="local steps of 4 rows")
    parser.add_argument("--repeats", type=int, default=0, help=f"default {REPEATS}")
    chosen = parser.parse_args()
    model = "tiny" if chosen.quick else chosen.model
    repeats = chosen.repeats or (QUICK_REPEATS if chosen.quick else REPEATS)
    print(f"{model}, {chosen.steps} steps of 4 rows, 1 thread, {repeats} repeats in turns")
    figures = figures_of(measure(*training_message(model, chosen.steps), repeats))
    for name, bound in GATES.items():
        met = "met" if figures[name] >= bound else "not met"
        print(f"{name}: {figures[name]:.3g}, gate >= {bound:g}: {met}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
