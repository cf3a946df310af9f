"""From Hydra's groups to a typed configuration; with ``cli`` the only place that knows Hydra."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedllm_flwr.config import RunConfig, run_config
from fedllm_flwr.errors import ConfigError

CONF = Path(__file__).resolve().parents[1] / "conf"
"""The groups, found beside the package: in a checkout, in a wheel and in an unpacked FAB alike."""

DOOR_KEYS = ("action", "run")
"""Keys of the command line that are not part of a run's configuration."""


@dataclass(frozen=True)
class Composed:
    """A checked configuration and what the command line wants done with it."""

    config: RunConfig
    action: str
    run: str


def compose_run(overrides: Sequence[str]) -> Composed:
    """Compose and check a run.

    Args:
        overrides: Hydra overrides, such as ``experiment=r8_demo`` and ``num_rounds=3``.

    Raises:
        ConfigError: An experiment, group, key, value or type is wrong, or settings exclude each other; one line.
    """
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            node = compose("config", overrides=list(overrides))
        return from_node(node)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(one_line(str(error), overrides)) from error


def from_node(node: DictConfig) -> Composed:
    """Check what Hydra composed.

    Raises:
        ConfigError: See :func:`compose_run`.
        OmegaConfBaseException: An interpolation or a mandatory value is missing.
    """
    tree: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    tree.pop("hydra", None)
    doors = {key: str(tree.pop(key) or "") for key in DOOR_KEYS}
    return Composed(run_config(tree), **doors)


def one_line(text: str, overrides: Sequence[str]) -> str:
    """Hydra's message as one line that names the offending setting and lists the choices."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if match := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        group, name = match.groups()
        known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"{group}: expected one of {', '.join(known)}, got {name!r}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: unknown key; to see the keys of this experiment add --cfg job"
    return " ".join(dict.fromkeys(lines)) + f" (given: {' '.join(overrides) or 'no overrides'})"
