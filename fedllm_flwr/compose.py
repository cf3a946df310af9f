"""From Hydra's groups to a typed configuration; with ``cli`` the only place that knows Hydra."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedllm_flwr.config import RunConfig, run_config
from fedllm_flwr.elsewhere import counterpart
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.noise_target import with_target_noise
from fedllm_flwr.project import project_conf
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.settings.serving import ServingConfig
from fedllm_flwr.settings.tree import from_tree
from fedllm_flwr.settings.verification import VerificationConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
"""The groups, found beside the package: in a checkout, in a wheel and in an unpacked FAB alike."""

DOOR_KEYS = (
    "action",
    "run",
    "format",
    "replay",
    "prices",
    "probe",
    "forget",
    "removal",
    "verify",
    "fallback",
)
"""Keys of the command line that are not part of a run's configuration."""

READ_BY = {
    "format": ("costs", "cascade"),
    "replay": ("cascade",),
    "prices": ("cascade",),
    "probe": ("evaluate",),
    "forget": ("unlearn",),
    "removal": ("unlearn",),
    "verify": ("unlearn",),
    "fallback": ("unlearn",),
}
"""Which actions read a key; others refuse it."""

UNLEARN_WORDS = {"client=": "forget=", "method=": "removal=", "budget=": "verification.budget="}
"""With action=unlearn these words name a client, a way to remove it and a number of queries; else they choose of a
group."""

VERIFY_WORDS = {"budget=": "verification.budget="}
"""With action=verify."""

CASCADE_ACTIONS = ("cascade", "calibrate", "query", "serve")
"""Which actions read the group ``cascade``, which is no part of a run's configuration either."""

NO_CASCADE = CascadeConfig(name="none")
DEFAULT_SERVING = ServingConfig()
DEFAULT_VERIFICATION = VerificationConfig()


@dataclass(frozen=True)
class Composed:
    """A checked configuration and what the command line wants done with it.

    Raises:
        ConfigError: A key is set that the action does not read.
    """

    config: RunConfig
    action: str
    run: str
    format: str = ""
    replay: str = ""
    prices: str = ""
    probe: str = ""
    forget: str = ""
    removal: str = ""
    verify: str = ""
    fallback: str = ""
    cascade: CascadeConfig = NO_CASCADE
    serving: ServingConfig = DEFAULT_SERVING
    verification: VerificationConfig = DEFAULT_VERIFICATION

    def __post_init__(self) -> None:
        """Refuse a key that the action would not read."""
        for key, actions in READ_BY.items():
            if getattr(self, key) and self.action not in actions:
                raise ConfigError(
                    f"{key}={getattr(self, key)}: expected with action={' or '.join(actions)}, got action={self.action}"
                )
        if self.cascade.tiers and self.action not in CASCADE_ACTIONS:
            raise ConfigError(
                f"cascade={self.cascade.name}: expected with action={' or '.join(CASCADE_ACTIONS)}, got "
                f"action={self.action}"
            )
        if self.serving != DEFAULT_SERVING and self.action != "serve":
            raise ConfigError(
                f"serving: expected its settings with action=serve, got action={self.action}"
            )
        for key, known in (("verify", "adversarial"), ("fallback", "retrain")):
            if getattr(self, key) not in ("", known):
                raise ConfigError(f"{key}: expected {known}, got {getattr(self, key)!r}")
        verifies = self.action == "verify" or bool(self.verify)
        if not verifies and (self.fallback or self.verification != DEFAULT_VERIFICATION):
            raise ConfigError(
                "fallback, budget and verification: expected with action=verify, or action=unlearn "
                f"verify=adversarial, got action={self.action} without verify="
            )


def compose_run(overrides: Sequence[str], project: Path | None = None) -> Composed:
    """Compose and check a run.

    Args:
        overrides: Hydra overrides, such as ``experiment=r8_demo`` and ``num_rounds=3``.
        project: A folder whose own experiments and group files can be chosen too (see :mod:`fedllm_flwr.project`).

    Raises:
        ConfigError: An experiment, group, key, value or type is wrong, or settings exclude each other; one line.
    """
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            node = compose("config", overrides=[*_unlearn_words(overrides), *search_path(project)])
        return from_node(node)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(one_line(str(error), overrides, project)) from error


def _unlearn_words(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra has to read them."""
    own = {"action=unlearn": UNLEARN_WORDS, "action=verify": VERIFY_WORDS}
    words = [each for action, named in own.items() if action in overrides for each in named.items()]
    found = ((o, next(((w, k) for w, k in words if o.startswith(w)), ("", ""))) for o in overrides)
    return [key + override.removeprefix(word) for override, (word, key) in found]


def search_path(project: Path | None) -> list[str]:
    """The override by which Hydra looks into a project's folder after the package's; none without a project.

    Raises:
        ConfigError: See :func:`fedllm_flwr.project.project_conf`.
    """
    if project is None:
        return []
    folder = str(project_conf(project.absolute(), CONF))
    quoted = folder.replace('"', '\\"')
    return [f'hydra.searchpath=["file://{quoted}"]']


def choices(group: str, project: Path | None = None) -> list[str]:
    """What a group offers, the project's files included."""
    folders = [CONF, *([project / "conf"] if project else [])]
    return sorted(path.stem for folder in folders for path in (folder / group).glob("*.yaml"))


def from_node(node: DictConfig) -> Composed:
    """Check what Hydra composed.

    Raises:
        ConfigError: See :func:`compose_run`.
        OmegaConfBaseException: An interpolation or a mandatory value is missing.
    """
    tree: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    tree.pop("hydra", None)
    doors = {key: _typed(tree.pop(key, "")) for key in DOOR_KEYS}
    cascade = from_tree(CascadeConfig, tree.pop("cascade", {"name": "none"}), "cascade")
    serving = from_tree(ServingConfig, tree.pop("serving", {}), "serving")
    verification = from_tree(VerificationConfig, tree.pop("verification", {}), "verification")
    composed = Composed(
        run_config(tree), **doors, cascade=cascade, serving=serving, verification=verification
    )
    if composed.action != "run":  # the others take a run's settings from what it left
        return composed
    return replace(composed, config=with_target_noise(composed.config))


def _typed(value: Any) -> str:
    """A door key as text; the entries of a list are joined by commas."""
    if isinstance(value, list):
        return ",".join(str(entry) for entry in value)
    return "" if value is None else str(value)


def one_line(text: str, overrides: Sequence[str], project: Path | None = None) -> str:
    """Hydra's message as one line that names the offending setting and lists the choices."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if match := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        group, name = match.groups()
        return f"{group}: expected one of {', '.join(choices(group, project))}, got {name!r}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: unknown key{counterpart(match[1])}; to see the keys of this experiment add --cfg job"
    return " ".join(dict.fromkeys(lines)) + f" (given: {' '.join(overrides) or 'no overrides'})"
