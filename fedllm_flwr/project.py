"""A project folder: a Flower app of the user's own, whose configurations stand beside the package's.

A folder is a project if its ``pyproject.toml`` has a table ``[tool.fedllm]``. Its ``conf`` folder has the same groups
as the package's and adds files to them.
"""

import tomllib
from pathlib import Path

from fedllm_flwr.errors import ConfigError

MARK = "fedllm"
"""The table of ``pyproject.toml``'s ``[tool]`` that makes a folder a project."""


def find_project(folder: Path) -> Path | None:
    """The folder itself if it is a project, else None.

    Args:
        folder: Where a command was typed; folders above it are not looked at.

    Raises:
        ConfigError: Its ``pyproject.toml`` cannot be read.
    """
    path = folder / "pyproject.toml"
    if not path.is_file():
        return None
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected TOML, got: {error}") from None
    tools = table.get("tool")
    return folder if isinstance(tools, dict) and MARK in tools else None


def project_conf(project: Path, package_conf: Path) -> Path:
    """The folder of a project's configurations.

    Args:
        project: The project.
        package_conf: The package's own configurations.

    Raises:
        ConfigError: There is no such folder, or a file has the name of one of the package's, which would hide it.
    """
    conf = project / "conf"
    if not conf.is_dir():
        raise ConfigError(
            f"{project}: expected a folder conf with the project's experiments, got none"
        )
    for path in sorted(conf.rglob("*.yaml")):
        name = path.relative_to(conf)
        if (package_conf / name).exists():
            raise ConfigError(f"{path}: fedllm has conf/{name} too, choose another name")
    return conf
