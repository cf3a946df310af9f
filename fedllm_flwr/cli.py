"""``fedllm``: Hydra's command line over runs, sweeps and everything that can be done with a run directory."""

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from fedllm_flwr.elsewhere import counterpart
from fedllm_flwr.errors import ConfigError, FedLLMError, RunStoppedError
from fedllm_flwr.project import find_project

INTERRUPTED = 130
DONE, WRONG_INPUT, GAVE_UP = 0, 2, 3
SWEEP_FLAGS = ("-m", "--multirun")
HELP_FLAGS = ("-h", "--help")
HYDRA_FLAGS = ("--hydra-help", "-c", "--cfg", "-i", "--info", "--version")
"""What Hydra answers by itself."""

COMMANDS = ("deploy", "init", "daemon")

HELP = """\
fedllm: adapt language models across parties that cannot share their data

  fedllm experiment=NAME [key=value ...]             run an experiment of conf/experiment
  fedllm -m experiment=A,B seed=0,1 [key=a,b ...]    run every combination and compare them
  fedllm action=ACTION run=DIR [key=value ...]       use what a run left: {actions}
  fedllm deploy [--nodes N] [--dry-run] [key=value ...]
                                                     a SuperLink and SuperNodes on this machine, for trials
  fedllm init NAME [--method M] [--model M]          a project folder: your own experiments and data, as a Flower app
  fedllm daemon [--socket PATH]                      on a node: keep the model loaded between messages
  fedllm --cfg job [key=value ...]                   print the composed configuration
  fedllm --hydra-help                                what Hydra can do besides

experiments: {experiments}
groups (group=option): {groups}

In a project folder its own conf/ is searched too.
Every option is a key of conf/<group>/<option>.yaml, where a comment says what it means.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default the process's own.

    Returns:
        0 done; 2 the input or the configuration is wrong, and nothing was written; 3 the run gave up and can be
        resumed; 4 a verification failed or is inconclusive.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # stop the SuperLink that we started, then end
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _main(given)
    except FedLLMError as error:
        print(f"fedllm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        begun = [run for run in stop.args if (Path(run) / "manifest.json").exists()]
        hint = "".join(f"; fedllm action=resume run={run} goes on" for run in begun)
        print(f"fedllm: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED


def _main(given: list[str]) -> int:
    if given[:1] == ["deploy"]:
        from fedllm_flwr.deploying.command import deploy

        return deploy(given[1:])
    if given[:1] == ["init"]:
        from fedllm_flwr.deploying.new_project import init

        return init(given[1:])
    if given[:1] == ["daemon"]:
        from fedllm_flwr.daemon.command import daemon

        return daemon(given[1:])
    overrides = [a for a in given if not a.startswith("-")]
    flags = [a for a in given if a.startswith("-")]
    if any(flag in HELP_FLAGS for flag in flags):
        return _help()
    unknown = [flag for flag in flags if flag.partition("=")[0] not in (*HYDRA_FLAGS, *SWEEP_FLAGS)]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: unknown flag{counterpart(unknown[0])}; settings are written key=value without dashes, "
            f"flags are {', '.join((*SWEEP_FLAGS, *HELP_FLAGS, *HYDRA_FLAGS))}"
        )
    from fedllm_flwr.compose import compose_run

    if any(flag.partition("=")[0] in HYDRA_FLAGS for flag in flags):
        settings = [
            o for o in overrides if "=" in o or o.startswith("~")
        ]  # not the `job` of `--cfg job`
        for job in expand(settings):
            compose_run(
                job, find_project(Path.cwd())
            )  # what does not compose is said in our words, not in Hydra's
        return _through_hydra(given)
    words = [o for o in overrides if "=" not in o and not o.startswith("~")]
    if words:
        raise ConfigError(
            f"{words[0]}: unknown command{counterpart(words[0])}; commands are {', '.join(COMMANDS)}, and settings are "
            "written key=value"
        )
    if flags:
        return _sweep(given, overrides)
    from fedllm_flwr.actions import act
    from fedllm_flwr.unread import refuse_unread

    composed = compose_run(overrides, find_project(Path.cwd()))
    if composed.action == "run":
        refuse_unread([composed.config], overrides)
    return act(composed, overrides)


def _help() -> int:
    """Print what can be typed, with the experiments and groups that are there."""
    from fedllm_flwr.actions import ACTIONS
    from fedllm_flwr.compose import CONF, choices

    groups = sorted(path.name for path in CONF.iterdir() if any(path.glob("*.yaml")))
    experiments = choices("experiment", find_project(Path.cwd()))
    lists = {"actions": ACTIONS, "experiments": experiments, "groups": groups}
    print(HELP.format(**{name: ", ".join(found) for name, found in lists.items()}), end="")
    return DONE


def _sweep(given: list[str], overrides: list[str]) -> int:
    """Check every job of the sweep first, then let Hydra run them, then compare."""
    from fedllm_flwr.actions import compare_sweep, sweep_superlink
    from fedllm_flwr.compose import compose_run
    from fedllm_flwr.preflight import preflight
    from fedllm_flwr.unread import refuse_unread

    project = find_project(Path.cwd())
    jobs = [compose_run(job, project) for job in expand(overrides)]
    others = [job.action for job in jobs if job.action != "run"]
    if others:
        raise ConfigError(
            f"action={others[0]} and --multirun: a sweep runs experiments, use action=run"
        )
    configs = [job.config for job in jobs]
    refuse_unread(configs, overrides)
    for config in configs:
        preflight(config)
    if not any(o.startswith("hydra.sweep.dir=") for o in overrides):
        given = [
            *given,
            f"hydra.sweep.dir={Path('outputs') / 'sweeps' / time.strftime('%Y-%m-%d_%H-%M-%S')}",
        ]
    _JOBS.clear()
    _EXPECTED[:] = [len(configs)]
    with sweep_superlink(configs) as superlink:
        _SUPERLINK[:] = [superlink]
        _through_hydra(given)
    compare_sweep([path for path, _ in _JOBS], _JOBS[0][0].parent)
    stopped = [f"{path}: {error}" for path, error in _JOBS if error]
    if stopped:
        raise RunStoppedError(
            f"{len(stopped)} of {len(_JOBS)} runs of the sweep stopped: {'; '.join(stopped)}"
        )
    return DONE


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs that Hydra's basic sweeper makes of ``a=1,2 b=x``; other sweepers choose theirs as they go.

    Returns:
        One list of overrides per job.

    Raises:
        ConfigError: An override cannot be read.
    """
    jobs: list[list[str]] = [[]]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for override in parsed:
        if override.is_hydra_override():
            continue
        if override.is_sweep_override():
            key = override.get_key_element()
            choices = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices = [str(override.input_line)]
        jobs = [[*job, choice] for job in jobs for choice in choices]
    return jobs


_JOBS: list[tuple[Path, str]] = []
_EXPECTED: list[int] = [0]
_SUPERLINK: list[Any] = [None]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def _job(node: DictConfig) -> float | None:
    """One job of a sweep; its objective is the accuracy, or minus the loss."""
    from fedllm_flwr.actions import run_experiment
    from fedllm_flwr.compose import from_node

    settings = HydraConfig.get()
    overrides = [o for o in settings.overrides.task if not o.startswith("out_dir=")]
    out_dir = Path(settings.sweep.dir) / settings.sweep.subdir
    config = from_node(node).config
    print(f"run {len(_JOBS) + 1} of {_EXPECTED[0]}: {' '.join(overrides)}", file=sys.stderr)
    try:
        summary = run_experiment(config, overrides, str(out_dir), _SUPERLINK[0])
    except FedLLMError as error:
        print(f"fedllm: {error}", file=sys.stderr)
        _JOBS.append((out_dir, str(error)))
        return None
    _JOBS.append((out_dir, ""))
    # a run all of whose clients failed to answer its last evaluation has neither
    return summary.get("accuracy", -summary.get("loss", math.inf))


def _through_hydra(given: list[str]) -> int:
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    from fedllm_flwr.compose import search_path

    kept, sys.argv = sys.argv, [sys.argv[0], *given, *search_path(find_project(Path.cwd()))]
    try:
        _job()
    finally:
        sys.argv = kept
    return DONE


if __name__ == "__main__":
    sys.exit(main())
