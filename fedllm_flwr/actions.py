"""What ``fedllm action=…`` does: run, go on, evaluate, report, forget; count costs; serve."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm_flwr.cascade_actions import (
    cascade_at_clients,
    renderers_of,
    serve_cascade,
    show_cascade,
)
from fedllm_flwr.compose import Composed
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import (
    chosen_runtime,
    default_out_dir,
    open_existing,
    resumed_config,
)
from fedllm_flwr.costs import FORMATS, PUBLISHED_SHAPES, cost_tables, memory_rows, model_shape
from fedllm_flwr.errors import ConfigError, VerificationError
from fedllm_flwr.launch import SuperLink, launch, simulation_superlink
from fedllm_flwr.models.backbone import ALL_LINEAR
from fedllm_flwr.models.shapes import layer_shapes, model_config
from fedllm_flwr.preflight import check_out_dir, preflight
from fedllm_flwr.runs.compare import compare
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.report import write_report
from fedllm_flwr.runs.status import run_status
from fedllm_flwr.runs.tables import render_result_table
from fedllm_flwr.runs.tensorboard import write_tensorboard

Render = Callable[[Any], str]


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
    show_run(Path(out_dir))
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
    show_run(directory.path)
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


def _status(composed: Composed, overrides: Sequence[str]) -> int:
    """Say how far a run is; JSON on standard output, for people and monitors alike. Changes nothing."""
    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "status")
    print(json.dumps(run_status(directory), indent=2))
    return 0


def _evaluate(composed: Composed, overrides: Sequence[str]) -> int:
    """Evaluate what a run left, in this process; JSON on standard output.

    On the task's whole test split, or with ``probe=`` on a probe of social bias.
    """
    from fedllm_flwr.evaluation import evaluate_run
    from fedllm_flwr.probing import probe_run

    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "evaluate", "runtime", "probe=")
    runtime = chosen_runtime(directory, composed.config.runtime, overrides)
    if composed.probe:
        print(json.dumps(probe_run(directory, runtime, composed.probe)))
    else:
        print(json.dumps(evaluate_run(directory, runtime)))
    return 0


def _unlearn(composed: Composed, overrides: Sequence[str]) -> int:
    """Take a client out of a finished run, into a new run directory; the certificate on standard output."""
    from fedllm_flwr.forgetting.command import unlearn, wanted
    from fedllm_flwr.forgetting.request import read_request

    directory = RunDirectory.open(_needed(composed))
    verifying = ("verify=", "budget=", "fallback=", "verification")
    _only(overrides, "unlearn", "client=", "method=", "out_dir=", "runtime", *verifying)
    runtime = chosen_runtime(directory, composed.config.runtime, overrides)
    request = read_request(directory, composed.forget, composed.removal, runtime)
    asked, kept = None, [o for o in overrides if o.startswith("runtime")]
    if composed.verify:
        asked = wanted(request, composed.verification, kept, falls_back=bool(composed.fallback))
    out_dir = Path(composed.config.out_dir) if composed.config.out_dir else None
    folder = unlearn(request, out_dir, kept, run_experiment, asked)
    return _certified(folder)


def _verify(composed: Composed, overrides: Sequence[str]) -> int:
    """Attack a run that a client was taken out of; its certificate, with the verdict, on standard output."""
    from fedllm_flwr.forgetting.command import verify_run

    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "verify", "runtime", "budget=", "verification")
    runtime = chosen_runtime(directory, composed.config.runtime, overrides)
    kept = [o for o in overrides if o.startswith("runtime")]
    folder = verify_run(directory, runtime, composed.verification, kept, run_experiment)
    return _certified(folder)


def _certified(folder: Path) -> int:
    """Print a removal's certificate.

    Raises:
        VerificationError: Its verdict is not a pass.
    """
    from fedllm_flwr.forgetting.command import told

    print(told(folder))
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    decision = RunDirectory.open(folder).summary().get("verdict", "pass")
    if decision != "pass":
        raise VerificationError(
            f"{folder}: the verification says {decision}; certificate.md says which check decided"
        )
    return 0


def _costs(composed: Composed, overrides: Sequence[str]) -> int:
    """Print what FedResPrompt and LoRA cost, for known models and the chosen one, and what training it would hold."""
    renderers = renderers_of(FORMATS, composed.format or "all")
    ref = composed.config.model.ref(composed.config.runtime.model_path)
    config = model_config(ref).get_text_config(decoder=True)
    chosen = model_shape(config, ref.label)
    layers = layer_shapes(ref, (ALL_LINEAR,))
    matrices = [(layer.out_features, layer.in_features) for layer in layers]
    memory = memory_rows(matrices, model=ref.label, width=chosen.width)
    tables = cost_tables((*PUBLISHED_SHAPES, chosen), memory=memory)
    print("\n".join(render(tables) for render in renderers), end="")
    return 0


def _serve(composed: Composed, overrides: Sequence[str]) -> int:
    """Answer HTTP requests with the model that a run left, until told to stop."""
    from fedllm_flwr.serving.server import serve_run

    if composed.cascade.tiers:
        return serve_cascade(composed, overrides)
    directory = RunDirectory.open(_needed(composed))
    _only(overrides, "serve", "serving", "runtime")
    runtime = chosen_runtime(directory, composed.config.runtime, overrides)
    serve_run(directory, runtime, composed.serving)
    return 0


ACTIONS: dict[str, Callable[[Composed, Sequence[str]], int]] = {
    "run": _run,
    "resume": _resume,
    "evaluate": _evaluate,
    "report": _report,
    "unlearn": _unlearn,
    "verify": _verify,
    "status": _status,
    "costs": _costs,
    "cascade": show_cascade,
    "calibrate": cascade_at_clients,
    "query": cascade_at_clients,
    "serve": _serve,
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


def show_run(out_dir: Path) -> None:
    """Print a run's table, and on standard error where its report is."""
    render_result_table(RunDirectory.open(out_dir))
    print(f"report: {out_dir / 'report.html'}", file=sys.stderr)
