"""The ServerApp: the door of ``flwr run``, for Ray simulation and for a real SuperLink alike."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm_flwr.compose import compose_run
from fedllm_flwr.core import chosen_runtime, default_out_dir, resumed_config, run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.examining import examine_run
from fedllm_flwr.federated_cascade import ACTIONS, federate
from fedllm_flwr.preflight import preflight
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE, MODEL_PATH_VARIABLE, RuntimeConfig
from fedllm_flwr.unread import refuse_unread


def make_app(project: Path | None = None) -> ServerApp:
    """The ServerApp of this package, or of a project whose own experiments it can run too.

    Args:
        project: The folder of the project's ``pyproject.toml``; in a FAB, where ``server.py`` lies.
    """
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, context, project)

    return made


def serve(grid: Grid, context: Context, project: Path | None) -> None:
    """Compose what the run config names and check it as every door does; run or resume it, or ask a cascade's clients.

    With ``action=examine`` it puts a verification's question to a client instead.

    Raises:
        ConfigError: The settings are wrong, or the action is no work of a ServerApp.
    """
    overrides = shlex.split(str(context.run_config.get("overrides", "")))
    experiment = str(context.run_config.get("experiment", ""))
    named = [f"experiment={experiment}"] if experiment else []
    composed = compose_run([*named, *overrides], project)
    config = composed.config
    if composed.action == "examine":
        own = _with_paths(config.runtime)
        examine_run(grid, composed.run, config.out_dir, own, overrides)
        return
    if composed.action == "resume":
        directory = RunDirectory.open(composed.run)
        config = resumed_config(directory, chosen_runtime(directory, config.runtime, overrides))
    out_dir = config.out_dir or default_out_dir(config)
    config = replace(config, runtime=_with_paths(config.runtime), out_dir=out_dir)
    if composed.action in ACTIONS:
        federate(grid, config, composed.cascade, composed.action)
        return
    if composed.action not in ("run", "resume"):
        raise ConfigError(
            f"action={composed.action}: expected run, resume, {' or '.join(ACTIONS)} under Flower; fedllm does the rest"
        )
    if (
        named and composed.action == "run"
    ):  # what `fedllm` submits names none, and was checked with its whole sweep
        refuse_unread([config], overrides)
    preflight(config)
    run(grid, config, config.out_dir)


def _with_paths(runtime: RuntimeConfig) -> RuntimeConfig:
    """The runtime with the files that this machine's environment names."""
    return replace(
        runtime,
        data_path=os.environ.get(DATA_PATH_VARIABLE, ""),
        model_path=os.environ.get(MODEL_PATH_VARIABLE, ""),
    )


app = make_app()
