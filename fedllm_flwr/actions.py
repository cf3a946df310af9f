"""What ``fedllm action=…`` does: run, go on, evaluate, report; count costs; replay answers through a cascade."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

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
from fedllm_flwr.runs.directory import MANIFEST, RunDirectory
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
    renderers = _renderers(FORMATS, composed.format or "all")
    ref = composed.config.model.ref(composed.config.runtime.model_path)
    config = model_config(ref).get_text_config(decoder=True)
    chosen = model_shape(config, ref.label)
    layers = layer_shapes(ref, (ALL_LINEAR,))
    matrices = [(layer.out_features, layer.in_features) for layer in layers]
    memory = memory_rows(matrices, model=ref.label, width=chosen.width)
    tables = cost_tables((*PUBLISHED_SHAPES, chosen), memory=memory)
    print("\n".join(render(tables) for render in renderers), end="")
    return 0


def _cascade(composed: Composed, overrides: Sequence[str]) -> int:
    """Print the accuracy and cost of a cascade for each threshold, and of what it must beat.

    Over recorded answers, or over those that the configured tiers are asked for now.
    """
    from fedllm_flwr import cascade
    from fedllm_flwr.tasks.records import read_json_lines

    if not composed.replay:
        return _cascade_now(composed, overrides)
    read = ("action=", "replay=", "prices=", "format=", "seed=", "hydra.")
    ignored = [o for o in overrides if not o.lstrip("+~").startswith(read)]
    if ignored:
        raise ConfigError(
            f"action=cascade: expected only replay=, prices=, format= and seed=, got {ignored[0]}"
        )
    renderers = _renderers(cascade.FORMATS, composed.format or "markdown")
    path = Path(composed.replay)
    lines = [(record.line, record.values) for record in read_json_lines(path)]
    recorded = cascade.recording(lines, path.name)
    prices = cascade.parse_prices(composed.prices, list(recorded.tiers))
    rows = cascade.replay(recorded, prices, composed.config.seed)
    print("\n".join(render(rows) for render in renderers), end="")
    return 0


def _cascade_now(composed: Composed, overrides: Sequence[str]) -> int:
    """Ask every tier everything, keep the answers, and print the tables of a replay."""
    from fedllm_flwr import cascade
    from fedllm_flwr.cascading import run_chain

    config = _cascade_config(composed, overrides)
    renderers = _renderers(cascade.FORMATS, composed.format or "markdown")
    rows = run_chain(config, composed.cascade, _say)
    print("\n".join(render(rows) for render in renderers), end="")
    return 0


def cascade_at_clients(
    composed: Composed, overrides: Sequence[str], superlink: SuperLink | None = None
) -> int:
    """Calibrate a cascade at its clients, or answer their queries; JSON on standard output.

    Args:
        composed: What the command line asks.
        overrides: What composed it.
        superlink: As in :func:`fedllm_flwr.launch.launch`.

    Raises:
        ConfigError: A setting is wrong, or the output folder holds a run already; nothing was started or written.
        RunStoppedError: Too few clients answered, or Flower reports a failure.
    """
    from fedllm_flwr.federated_cascade import federate, prepared, tiers_override

    def at_clients(grid: Grid, config: RunConfig, out_dir: str) -> dict[str, Any]:
        return federate(grid, config, composed.cascade, composed.action)

    config = _cascade_config(composed, overrides, "partition", "strategy.")
    if (Path(config.out_dir) / MANIFEST).exists():
        raise ConfigError(f"{config.out_dir}: holds a run already, name another out_dir")
    config = prepared(config, composed.cascade, composed.action)
    words = [*overrides, tiers_override(composed.cascade)]
    print(json.dumps(launch(config, words, superlink, at_clients)))
    return 0


def _cascade_config(composed: Composed, overrides: Sequence[str], *more: str) -> RunConfig:
    """The settings of a cascade of real models; others would not be read.

    Raises:
        ConfigError: Names the first of them, or the output folder cannot be written.
    """
    read = ("action=", "experiment=", "cascade", "task", "seed=", "runtime", "out_dir=", "format=",
            "hydra.", *more)  # fmt: skip
    ignored = [o for o in overrides if not o.lstrip("+~").startswith(read)]
    if ignored:
        raise ConfigError(
            f"action={composed.action}: expected only cascade, task, runtime, seed, out_dir and format settings, got "
            f"{ignored[0]}"
        )
    config = composed.config
    config = replace(config, out_dir=config.out_dir or default_out_dir(config))
    check_out_dir(Path(config.out_dir))
    return config


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _renderers(formats: Mapping[str, Render], name: str) -> list[Render]:
    """The named format, or every one.

    Raises:
        ConfigError: There is no such format.
    """
    if name == "all":
        return list(formats.values())
    if name not in formats:
        raise ConfigError(f"format: expected one of {', '.join(formats)}, all, got {name!r}")
    return [formats[name]]


def _serve_cascade(composed: Composed, overrides: Sequence[str]) -> int:
    """Answer HTTP requests with a chain of tiers, until told to stop."""
    from fedllm_flwr.cascading import check_votes, open_chain
    from fedllm_flwr.serving.chain_model import ChainModel
    from fedllm_flwr.serving.server import checked_token, serve
    from fedllm_flwr.tiers import Chain

    if composed.run:
        raise ConfigError(
            f"action=serve: expected run= or cascade.tiers, got both, run={composed.run}"
        )
    if not composed.cascade.thetas:
        raise ConfigError(
            "action=serve: expected cascade.thetas, one for each tier but the last; action=cascade finds them"
        )
    check_votes(composed.cascade, "serve")
    config = _cascade_config(composed, overrides, "serving")
    token = checked_token(composed.serving)
    task, tiers = open_chain(config, composed.cascade)
    chain = Chain(tiers, composed.cascade.thetas)
    serve(ChainModel(config.experiment, chain, task), composed.serving, token)
    return 0


def _serve(composed: Composed, overrides: Sequence[str]) -> int:
    """Answer HTTP requests with the model that a run left, until told to stop."""
    from fedllm_flwr.serving.server import serve_run

    if composed.cascade.tiers:
        return _serve_cascade(composed, overrides)
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
    "cascade": _cascade,
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
