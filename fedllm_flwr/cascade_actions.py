"""What ``fedllm action=cascade``, ``calibrate``, ``query`` and ``serve`` do with a chain of tiers."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedllm_flwr.compose import Composed
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import default_out_dir
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.launch import SuperLink, launch
from fedllm_flwr.preflight import check_out_dir
from fedllm_flwr.runs.directory import MANIFEST

Render = Callable[[Any], str]


def show_cascade(composed: Composed, overrides: Sequence[str]) -> int:
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
    renderers = renderers_of(cascade.FORMATS, composed.format or "markdown")
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
    renderers = renderers_of(cascade.FORMATS, composed.format or "markdown")
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


def serve_cascade(composed: Composed, overrides: Sequence[str]) -> int:
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


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def renderers_of(formats: Mapping[str, Render], name: str) -> list[Render]:
    """The named format, or every one.

    Raises:
        ConfigError: There is no such format.
    """
    if name == "all":
        return list(formats.values())
    if name not in formats:
        raise ConfigError(f"format: expected one of {', '.join(formats)}, all, got {name!r}")
    return [formats[name]]
