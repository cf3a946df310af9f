"""Who carries a run: an in-process grid, Flower's simulation on Ray, or a real SuperLink.

``flwr run`` always submits to a SuperLink. For simulations this module starts one of its own: on a free port, with a
Flower home of its own, from a neutral folder (simulated clients import from the folder where the SuperLink started
before they import from the FAB), with run-time installation of dependencies off, and it stops what it started.
``flwr run`` exits 0 for failed runs, so the verdict comes from ``flwr ls``.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from flwr.serverapp import Grid

from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import left_by, run
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.follow import Follower
from fedllm_flwr.processes import free_port, stop_tree, tool, wait_for_port
from fedllm_flwr.project import find_project
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.runtime import (
    DATA_PATH_VARIABLE,
    MODEL_PATH_VARIABLE,
    STATE_PATH_VARIABLE,
)

PROJECT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5
FIRST_STATUS_SECONDS, LAST_STATUS_SECONDS = 15.0, 120.0
SILENCE_SECONDS, LAST_WORDS_SECONDS = 900.0, 60.0
"""How long a SuperLink may be away, which a run with ``--isolation process`` survives; and once the run directory says
how the run ended."""
COMMAND_SECONDS = 120.0
"""Of a question to Flower: it does not always give up by itself."""
ENDED, UNKNOWN = ("completed", "failed", "stopped"), "unknown"
CONNECTION = "fedllm"

Core = Callable[[Grid, RunConfig, str], dict[str, Any]]
"""What is carried: grid, settings and run directory to a summary."""


@dataclass
class SuperLink:
    """A simulation SuperLink that this process started."""

    home: Path
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]


def launch(
    config: RunConfig,
    overrides: Sequence[str],
    superlink: SuperLink | None = None,
    core: Core = run,
) -> dict[str, Any]:
    """Carry one run to its end.

    Args:
        config: The run, checked; ``out_dir`` is set.
        overrides: What composed it, for the apps to compose again from the FAB.
        superlink: One to use: a sweep starts a single one, a trial network has its own. Without one a simulation starts
            its own, and a deployment goes to ``runtime.connection``.
        core: What runs within this process with ``runtime=loopback``; a ServerApp chooses it by the overrides.

    Returns:
        The run's summary.

    Raises:
        RunStoppedError: The run gave up, or Flower reports that it failed; it can be resumed.
        ConfigError: The configuration is wrong.
    """
    if config.runtime.name == "loopback":
        return _loopback(config, core)
    if config.runtime.name == "deployment" and superlink is None:
        if not config.runtime.connection:
            raise ConfigError(
                "runtime.connection: expected the name of your SuperLink's connection in Flower's config.toml, got "
                "nothing (`local` is Flower's own local SuperLink)"
            )
        home = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))
        home.mkdir(parents=True, exist_ok=True)
        link = SuperLink(home, Path(os.devnull), dict(os.environ), None)  # type: ignore[arg-type]
        return _flower(config, overrides, link, config.runtime.connection)
    if superlink is not None:
        return _flower(config, overrides, superlink, CONNECTION)
    with simulation_superlink(config) as own:
        return _flower(config, overrides, own, CONNECTION)


def _loopback(config: RunConfig, core: Core) -> dict[str, Any]:
    """Server and clients in this process."""
    from fedllm_flwr.client_app import app
    from fedllm_flwr.loopback import LoopbackGrid

    facts = {
        "data-path": config.runtime.data_path,
        "model-path": config.runtime.model_path,
        "state-path": str(state_folder(config)),
    }
    num_nodes = min(config.runtime.num_nodes, config.partition.num_clients)
    return core(LoopbackGrid(app, num_nodes, facts), config, config.out_dir)  # type: ignore[arg-type]


def state_folder(config: RunConfig) -> Path:
    """Where simulated clients keep what they must not lose: in the run directory, so that a resumed run finds it."""
    return Path(config.out_dir).absolute() / "clients"


@contextlib.contextmanager
def simulation_superlink(config: RunConfig) -> Iterator[SuperLink]:
    """Start a simulation SuperLink, and stop it and all of its children at the end.

    Raises:
        RunStoppedError: It did not start; the message holds the end of its log.
    """
    home = Path(tempfile.mkdtemp(prefix="fedllm-"))
    neutral = home / "empty"
    neutral.mkdir()
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = simulation_environment(config, home)
    command = [
        tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    log = home / "superlink.log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=neutral,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_for_port(port, process, log)
        yield SuperLink(home, log, environment, process)
    finally:  # by its command line: an interrupt may come before the handle is there
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if {"--simulation", str(port)} <= set(child.cmdline()):
                    stop_tree(child)
        shutil.rmtree(home, ignore_errors=True)


def simulation_environment(config: RunConfig, home: Path) -> dict[str, str]:
    """The environment that the SuperLink, the ServerApp and the Ray workers inherit."""
    threads = str(config.runtime.threads)
    quiet = (
        {} if config.runtime.verbose else {"RAY_DEDUP_LOGS": "1", "RAY_BACKEND_LOG_LEVEL": "error"}
    )
    facts = {
        DATA_PATH_VARIABLE: config.runtime.data_path,
        MODEL_PATH_VARIABLE: config.runtime.model_path,
        STATE_PATH_VARIABLE: str(state_folder(config)),
    }
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # not 15: workers starve beside other work
        "HYDRA_FULL_ERROR": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        **quiet,
        **{name: str(Path(path).resolve()) for name, path in facts.items() if path},
    }


def _flower(
    config: RunConfig, overrides: Sequence[str], link: SuperLink, connection: str
) -> dict[str, Any]:
    """Submit to a SuperLink, show the run directory as it grows, and take the verdict."""
    out_dir = Path(config.out_dir).resolve()
    kept = [
        o
        for o in overrides
        if not o.startswith(("out_dir=", "runtime.data_path=", "runtime.model_path="))
    ]
    text = shlex.join([*kept, f"out_dir={out_dir}"])
    app = find_project(Path.cwd()) or PROJECT
    command = [tool("flwr"), "run", str(app), connection, "--format", "json"]
    if config.runtime.name == "simulation":
        nodes = min(config.runtime.num_nodes, config.partition.num_clients)
        cores = max(1, (os.cpu_count() or 1) // config.runtime.workers)
        gpus = config.runtime.gpus_per_worker
        shares = f"client-resources-num-cpus={cores}" + (
            f" client-resources-num-gpus={gpus}" if gpus else ""
        )
        command += ["--federation-config", f"num-supernodes={nodes} {shares}"]
    with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
        run_config = Path(folder) / "run.toml"  # in an argument Flower would stumble over quotes
        overrides_text = json.dumps(text, ensure_ascii=False)
        run_config.write_text(f'experiment = ""\noverrides = {overrides_text}\n', encoding="utf-8")
        command += ["--run-config", str(run_config)]
        submitted = subprocess.run(command, env=link.environment, cwd=link.home, capture_output=True, text=True,
                                   check=False)  # fmt: skip
    run_id = _run_id(submitted.stdout, submitted.stderr)
    with _flower_log(config, link, connection, run_id), Follower(out_dir) as follower:
        try:
            status = _until_ended(link, connection, run_id, out_dir, follower)
        except KeyboardInterrupt:
            _ask_flower(link, "stop", run_id, connection)
            raise
        follower.look()
        summary = _summary(out_dir)
        if status != "completed" or summary is None:
            raise RunStoppedError(_why(link, connection, run_id, out_dir, status))
        follower.finished(summary)
    return summary


@contextlib.contextmanager
def _flower_log(config: RunConfig, link: SuperLink, connection: str, run_id: str) -> Iterator[None]:
    """With ``runtime.verbose``, Flower's and Ray's own log of the run on standard error."""
    if not config.runtime.verbose:
        yield
        return
    command = [tool("flwr"), "log", run_id, connection, "--stream"]
    shown = subprocess.Popen(command, env=link.environment, cwd=link.home, stdout=sys.stderr)
    try:
        yield
    finally:
        shown.terminate()
        shown.wait()


def _until_ended(
    link: SuperLink, connection: str, run_id: str, out_dir: Path, follower: Follower
) -> str:
    """Follow a run until Flower says that it has ended; ask ever more rarely, because ``flwr ls`` costs CPU seconds.

    Raises:
        RunStoppedError: The SuperLink has not answered for long, and the run directory has not grown or told an end.
    """
    pause = FIRST_STATUS_SECONDS
    last_sign = time.monotonic()
    next_question = last_sign + pause
    was_over = False
    while True:
        if follower.look():
            last_sign = time.monotonic()
        over = _summary(out_dir) is not None or follower.has_stopped
        if (over and not was_over) or time.monotonic() >= next_question:
            status = _status(link, connection, run_id)
            if status in ENDED:
                return status
            if status != UNKNOWN:
                last_sign = time.monotonic()
            elif over and time.monotonic() - last_sign > LAST_WORDS_SECONDS:
                return "completed"
            elif time.monotonic() - last_sign > SILENCE_SECONDS:
                raise RunStoppedError(
                    f"the SuperLink of connection {connection} has not answered for {SILENCE_SECONDS:g} s, and the run "
                    f"has not gone on; when it is back: fedllm action=resume run={out_dir}"
                )
            pause = POLL_SECONDS if over else min(2 * pause, LAST_STATUS_SECONDS)
            next_question = time.monotonic() + pause
        was_over = over
        time.sleep(POLL_SECONDS)


def _ask_flower(link: SuperLink, *words: str) -> str:
    """What a ``flwr`` command prints; nothing if it takes too long."""
    try:
        shown = subprocess.run([tool("flwr"), *words], env=link.environment, cwd=link.home, capture_output=True,
                               text=True, check=False, timeout=COMMAND_SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired:
        return ""
    return shown.stdout + shown.stderr


def _run_id(stdout: str, stderr: str) -> str:
    try:
        answer = json.loads(stdout[stdout.index("{") :])
    except ValueError:
        answer = {}
    if not answer.get("success") or "run-id" not in answer:
        reason = answer.get("error-message") or (stdout + stderr).strip()
        raise RunStoppedError(
            f"flwr run: the run was not accepted: {' '.join(str(reason).split())[-600:]}"
        )
    return str(answer["run-id"])


def _status(link: SuperLink, connection: str, run_id: str) -> str:
    """``flwr ls``'s word for the run: starting, running, completed, failed or stopped."""
    if link.process is not None and link.process.poll() is not None:
        return "failed"
    shown = _ask_flower(link, "ls", connection, "--run-id", run_id, "--format", "json")
    try:
        runs = json.JSONDecoder().raw_decode(shown[shown.index("{") :])[0]["runs"]
        return str(runs[0]["status"]).rpartition(":")[2]
    except (ValueError, KeyError, IndexError):
        return UNKNOWN


def _summary(out_dir: Path) -> dict[str, Any] | None:
    try:
        return RunDirectory.open(out_dir).summary() or None
    except ConfigError:
        return None


def _why(link: SuperLink, connection: str, run_id: str, out_dir: Path, status: str) -> str:
    """The reason that a failed run left: its own last words, else the end of Flower's log."""
    with contextlib.suppress(ConfigError):
        directory = RunDirectory.open(out_dir)
        hint = "" if left_by(directory) else f"; to go on: fedllm action=resume run={out_dir}"
        for event in reversed(directory.records("event")):
            if event["text"].startswith("stopped: "):
                return event["text"].removeprefix("stopped: ") + hint
    shown = _ask_flower(link, "log", run_id, connection, "--show")
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line] or lines[-5:]
    return f"the run {status} under Flower: {' | '.join(errors[-3:])}"
