"""One experiment through every door, with real SuperLinks and Ray: the same final adapter, and nothing left behind."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import fedllm_flwr
from fedllm_flwr.cli import main
from fedllm_flwr.launch import stop_tree
from fedllm_flwr.runs.directory import RunDirectory

pytestmark = [pytest.mark.simulation, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(fedllm_flwr.__file__).parents[1]
BIN = Path(sys.executable).parent
EXPERIMENT = ["experiment=smoke", "baselines=none", "partition.max_test_rows_per_client=16"]
MARK = "FEDLLM_TEST_RUN"
SECONDS = 600


class Terminal:
    """An empty folder to type commands in; everything that they start carries a mark in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        names = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        self.environment = kept | {
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "RAY_worker_niceness": "0",  # 15 unless it is said: on a busy machine its workers starve
        }

    def type(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(BIN / words[0]), *words[1:]], cwd=self.folder, env=self.environment | environment,
                              capture_output=True, text=True, timeout=SECONDS, check=False)  # fmt: skip

    def left_running(self) -> list[str]:
        """Processes that a command left behind; they get some seconds to end."""
        deadline = time.monotonic() + 15
        while (found := self.running()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def running(self) -> list[str]:
        """Command lines of the processes that carry the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get(MARK) == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(" ".join(process.cmdline())[:120])
            except psutil.Error:
                continue
        return found


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    terminal = Terminal(folder)
    yield terminal
    assert terminal.left_running() == []


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the experiment within one process."""
    out_dir = tmp_path_factory.mktemp("doors") / "loopback"
    assert main([*EXPERIMENT, f"out_dir={out_dir}"]) == 0
    return RunDirectory.open(out_dir).summary()


SAME = (
    "adapter_sha256",
    "fingerprint",
    "accuracy",
    "loss",
    "validation_accuracy",
    "dropped_replies",
)


def agreed(out_dir: Path, expected: dict[str, Any]) -> None:
    summary = RunDirectory.open(out_dir).summary()
    assert {name: summary[name] for name in SAME} == {name: expected[name] for name in SAME}


def test_one_and_two_workers_of_a_sweep_agree_with_loopback(
    terminal: Terminal, loopback: dict[str, Any]
) -> None:
    simulated = ["runtime=simulation", "runtime.dtype=float32", "runtime.workers=1,2"]
    ended = terminal.type("fedllm", "-m", *EXPERIMENT, *simulated, "hydra.sweep.dir=sweep")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert [path.name for path in terminal.folder.iterdir()] == ["sweep"]
    sweep = terminal.folder / "sweep"
    for job in ("0", "1"):
        agreed(sweep / job, loopback)
    with (sweep / "comparison.csv").open() as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["finished", "finished"]
    assert "round 2 of 2" in ended.stderr, "the run is shown while it goes on"
    for noise in ("ray", "Ray", "flwr", "INFO", "WARNING"):
        assert noise not in ended.stderr, "Flower's and Ray's own log is quiet"


def test_personal_and_clustered_prompts_agree_with_loopback(
    terminal: Terminal, tmp_path: Path
) -> None:
    prompts = [*EXPERIMENT, "method=fedprompt", "strategy=prompt_mean", "method.personal_length=2",
               "method.cluster_length=2", "fairness=bounded_loss", "runtime.cohort_tokens=0"]  # fmt: skip
    assert main([*prompts, f"out_dir={tmp_path / 'loopback'}"]) == 0
    ended = terminal.type(
        "fedllm", *prompts, "runtime=simulation", "runtime.dtype=float32", "out_dir=prompts"
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    runs = [RunDirectory.open(p) for p in (tmp_path / "loopback", terminal.folder / "prompts")]
    agreed(terminal.folder / "prompts", runs[0].summary())
    multipliers = [
        [(r["round"], r["group"], r["multiplier"]) for r in run.records("multiplier")]
        for run in runs
    ]
    assert multipliers[0] == multipliers[1]
    assert len(multipliers[0]) == 4, "two groups after each of two rounds"
    kept = [p.relative_to(terminal.folder) for p in terminal.folder.glob("prompts/clients/*/*")]
    assert sorted(p.name for p in kept) == ["0", "1", "2", "3"], "a folder for each client"


def test_a_cascade_at_the_clients_agrees_with_loopback(terminal: Terminal, tmp_path: Path) -> None:
    """One command: calibration, then queries. The first tier is a run that is named by a relative path."""
    out_dir = terminal.folder / "trained"
    assert main([*EXPERIMENT, "num_rounds=1", "runtime.cohort_tokens=0", f"out_dir={out_dir}"]) == 0
    cascade = [
        "experiment=smoke", "action=query", "task.test_rows=24", "task.validation_rows=20",
        "cascade.among=all", "cascade.risk=0.5", "cascade.confidence=0.5",
        "runtime.dtype=float32", "cascade.tiers=[{name:small,members:[{run:trained}],kind:self_consistency,samples:3,"
        "temperature:0.7},{name:large,members:[{model:tiny}]}]",
    ]  # fmt: skip
    absolute = [word.replace("run:trained", f"run:'{out_dir}'") for word in cascade]
    assert main([*absolute, f"out_dir={tmp_path / 'loopback'}"]) == 0
    ended = terminal.type("fedllm", *cascade, "runtime=simulation", "out_dir=run")
    assert ended.returncode == 0, ended.stderr[-2000:]
    here, there = (RunDirectory.open(p) for p in (tmp_path / "loopback", terminal.folder / "run"))
    own = there.summary()
    assert json.loads(ended.stdout) == own
    timed = (
        "seconds",
        "uplink_bytes",
        "downlink_bytes",
    )  # ids of nodes and of the run are longer under Flower
    assert {k: v for k, v in own.items() if k not in timed} == {
        k: v for k, v in here.summary().items() if k not in timed
    }
    assert 0 < own["deferral_rate"] < 1
    assert (here.path / "thresholds.json").read_text() == (
        there.path / "thresholds.json"
    ).read_text()
    one, other = (
        {(r["message"], r["direction"]): (r["messages"], r["bytes"]) for r in run.records("bytes")}
        for run in (here, there)
    )
    assert one.keys() == other.keys()
    for key, (messages, count) in one.items():
        assert other[key][0] == messages
        assert other[key][1] == pytest.approx(count, abs=100 * messages), key
    assert len(list(there.path.glob("clients/answers/*.jsonl"))) == 4


@pytest.fixture
def superlink(terminal: Terminal, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink as a Flower user starts one, in a folder of its own; gives the environment for ``flwr``."""
    home, neutral = tmp_path / "flower", tmp_path / "neutral"
    home.mkdir()
    neutral.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink.mine]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    settings = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    command = [str(BIN / "flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port),
               "--disable-runtime-dependency-installation"]  # fmt: skip
    path = f"{BIN}{os.pathsep}{terminal.environment['PATH']}"
    with (tmp_path / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=neutral, env=terminal.environment | settings | {"PATH": path},
                                   stdout=log, stderr=log, start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield settings
    stop_tree(process)


def test_flwr_run_typed_by_hand_agrees_with_loopback(
    terminal: Terminal, superlink: dict[str, str], loopback: dict[str, Any]
) -> None:
    out_dir = terminal.folder / "by hand"
    overrides = f"{' '.join(EXPERIMENT[1:])} 'out_dir={out_dir}'"
    run_config = f'experiment="smoke" overrides="{overrides}"'
    ended = terminal.type(
        "flwr", "run", str(ROOT), "mine", "--stream", "--run-config", run_config, **superlink
    )
    shown = terminal.type("flwr", "ls", "mine", "--format", "json", **superlink)
    (run,) = json.loads(shown.stdout)["runs"]
    assert run["status"] == "finished:completed", (ended.stdout + ended.stderr)[-2000:]
    agreed(out_dir, loopback)


def test_a_simulation_that_fails_ends_with_three_and_its_reason(terminal: Terminal) -> None:
    hasty = [
        "runtime=simulation",
        "strategy.round_timeout_seconds=0.01",
        "strategy.max_retries=0",
        "out_dir=run",
    ]
    ended = terminal.type("fedllm", *EXPERIMENT, *hasty)
    assert ended.returncode == 3, ended.stderr[-2000:]
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("fedllm: round 1: 0 of 4 clients gave a good reply in 1 attempts; ")
    assert last.endswith(f"; to go on: fedllm action=resume run={terminal.folder / 'run'}")
    assert "Traceback" not in ended.stderr
    run = RunDirectory.open(terminal.folder / "run")
    assert not run.is_finished
    assert {f["reason"] for f in run.records("failure") if f["round"] == 1} == {
        "no reply before the deadline"
    }


def test_an_interrupted_simulation_takes_its_superlink_along(terminal: Terminal) -> None:
    command = [str(BIN / "fedllm"), *EXPERIMENT, "runtime=simulation", "out_dir=run"]
    process = subprocess.Popen(command, cwd=terminal.folder, env=terminal.environment, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not any("flower-superlink" in line for line in terminal.running()):
        assert time.monotonic() < deadline, "no SuperLink was started"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert last in (
        "fedllm: interrupted",
        "fedllm: interrupted; fedllm action=resume run=run goes on",
    )
