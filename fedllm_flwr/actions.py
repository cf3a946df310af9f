"""What ``fedllm action=…`` does: run an experiment or go on with one, evaluate or report what it left, count costs."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm_flwr.compose import Composed
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import (
    chosen_runtime,
    default_out_dir,
    open_existing,
    resumed_config,
)
from fedllm_flwr.costs import FORMATS, PUBLISHED_SHAPES, cost_tables, model_shape
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.launch import SuperLink, launch, simulation_superlink
from fedllm_flwr.models.shapes import model_config
from fedllm_flwr.preflight import check_out_dir, preflight
from fedllm_flwr.runs.compare import compare
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.report import write_report
from fedllm_flwr.runs.tables import render_result_table
from fedllm_flwr.runs.tensorboard import write_tensorboard


def act(composed: Composed, overrides: Sequence[str]) -> int:
    """Do what the command line asks.

    Raises:
        ConfigError: The action is unknown or lacks its run directory.
        FedLLMError: Whatever the action raises.
    """
    if composed.action not in ACTIONS:
        raise ConfigError(f"action: expected one of {', '.join(ACTIONS)}, got {composed.action!r}")
    return ACTIONS[composed.action](composed, overrides)


def run_experiment(
    config: RunConfig, overrides: Sequence[str], out_dir: str, superlink: SuperLink | None = None
) -> dict[str, Any]:
    """Check a run, carry it, and leave its command in the run directory.

    Raises:
        KeyboardInterrupt: With the run directory, for whoever tells the user how to go on.
    """
    config = replace(config, out_dir=out_dir)
    existing = open_existing(config, Path(out_dir))
    if existing is not None and existing.is_finished:
        return existing.summary()
    check_out_dir(Path(out_dir))
    preflight(config)
    try:
        return launch(config, overrides, superlink)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(out_dir) from None


def _run(composed: Composed, overrides: Sequence[str]) -> int:
    config = composed.config
    out_dir = config.out_dir or default_out_dir(config)
    kept = [o for o in overrides if not o.startswith(("action=", "run="))]
    run_experiment(config, kept, out_dir)
    _show(Path(out_dir))
    return 0


def _resume(composed: Composed, overrides: Sequence[str]) -> int:
    """Go on with a run directory under the settings that it was started with; only ``runtime`` may be changed."""
    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "resume", "runtime")
    config = resumed_config(
        directory, chosen_runtime(directory, composed.config.runtime, overrides)
    )
    kept = [o for o in overrides if o.startswith("runtime")]
    run_experiment(
        config, ["action=resume", f"run={directory.path.resolve()}", *kept], str(directory.path)
    )
    _show(directory.path)
    return 0


def _only(overrides: Sequence[str], action: str, *changeable: str) -> None:
    """Refuse settings that an action on a run directory would not read.

    Raises:
        ConfigError: Names the first of them.
    """
    read = ("action=", "run=", "hydra.", *changeable)
    ignored = [o for o in overrides if not o.lstrip("+~").startswith(read)]
    if ignored:
        settings = f"only {' and '.join(changeable)} settings" if changeable else "no settings"
        raise ConfigError(
            f"action={action}: the run has its own settings, expected {settings} beside run=, got {ignored[0]}"
        )


def _report(composed: Composed, overrides: Sequence[str]) -> int:
    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "report")
    write_tensorboard(directory)
    render_result_table(directory)
    print(write_report(directory))
    return 0


def _evaluate(composed: Composed, overrides: Sequence[str]) -> int:
    """Evaluate a run's final adapter on the task's whole test split, in this process; JSON on standard output."""
    from fedllm_flwr.evaluation import evaluate_run

    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "evaluate", "runtime")
    runtime = chosen_runtime(directory, composed.config.runtime, overrides)
    print(json.dumps(evaluate_run(directory, runtime)))
    return 0


def _costs(composed: Composed, overrides: Sequence[str]) -> int:
    """Print what FedResPrompt and LoRA cost, for the published models and the chosen one, in every format."""
    ref = composed.config.model.ref(composed.config.runtime.model_path)
    config = model_config(ref).get_text_config(decoder=True)
    tables = cost_tables((*PUBLISHED_SHAPES, model_shape(config, ref.label)))
    print("\n".join(render(tables) for render in FORMATS.values()), end="")
    return 0


ACTIONS: dict[str, Callable[[Composed, Sequence[str]], int]] = {
    "run": _run,
    "resume": _resume,
    "evaluate": _evaluate,
    "report": _report,
    "costs": _costs,
}


@contextlib.contextmanager
def sweep_superlink(configs: Sequence[RunConfig]) -> Iterator[SuperLink | None]:
    """One SuperLink for all simulations of a sweep; None when there is no simulation."""
    simulated = [c for c in configs if c.runtime.name == "simulation"]
    if not simulated:
        yield None
        return
    with simulation_superlink(simulated[0]) as superlink:
        yield superlink


def compare_sweep(paths: Sequence[Path], folder: Path) -> None:
    """Write and print the comparison of a sweep's runs."""
    print(compare(paths, folder), file=sys.stderr)


def _needed(composed: Composed) -> str:
    if not composed.run:
        raise ConfigError(f"action={composed.action}: needs run=<run directory>, got none")
    return composed.run


def _show(out_dir: Path) -> None:
    render_result_table(RunDirectory.open(out_dir))
    print(f"report: {out_dir / 'report.html'}", file=sys.stderr)
