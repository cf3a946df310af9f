"""The tree keeps its own rules: every module has its test, every file its size, and none names a machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import fedllm_flwr

ROOT = Path(fedllm_flwr.__file__).parents[1]
PACKAGES = ("fedllm_flwr", "clients", "strategies")
TIERS = {"conf", "contracts", "simulation", "deployment", "benchmarks"}
"""Folders of tests that mirror no package."""

ALONE = {"test_tree", "test_readme", "test_fab", "test_dependencies"}
"""Tests of the project itself."""

ONCE = {"__init__", "__main__"}


def tracked(*patterns: str) -> list[Path]:
    """Files of the working tree that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file())


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in tracked(f"{package}/*.py")]


def twin(module: Path) -> Path:
    """Where the tests of a module are: ``fedllm_flwr/runs/units.py`` has ``tests/runs/test_units.py``."""
    parts = module.relative_to(ROOT).parts
    folder = parts[1:-1] if parts[0] == "fedllm_flwr" else parts[:-1]
    return ROOT.joinpath("tests", *folder, f"test_{module.stem}.py")


def own(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_every_module_has_its_tests() -> None:
    missing = [
        twin(module)
        for module in modules()
        if module.stem not in ONCE and not twin(module).exists()
    ]
    assert own(missing) == []


def test_every_test_file_has_its_module_or_is_of_a_tier() -> None:
    twins = {twin(module) for module in modules() if module.stem not in ONCE}
    # a package's own __init__ is tested as test_init
    twins |= {
        twin(module).with_name("test_init.py") for module in modules() if module.stem == "__init__"
    }
    odd = [
        path for path in tracked("tests/*.py")
        if path.name.startswith("test_") and path not in twins
        and path.relative_to(ROOT).parts[1] not in TIERS and path.stem not in ALONE
        and not any(path.stem.startswith(f"{known.stem}_") and path.parent == known.parent for known in twins)
    ]  # fmt: skip
    assert own(odd) == []


def test_tests_are_no_packages() -> None:
    """A tests/strategies/__init__.py would hide the real package."""
    assert own(tracked("tests/**/__init__.py", "tests/__init__.py")) == []


def test_no_module_is_a_drawer() -> None:
    assert [
        str(m) for m in modules() if m.stem in ("utils", "util", "helpers", "misc", "common")
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_two_levels_deep_at_most(package: str) -> None:
    assert max(len(path.relative_to(ROOT).parts) for path in tracked(f"{package}/*.py")) <= 3


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        module for module in modules() if not ast.get_docstring(ast.parse(module.read_text()))
    ]
    assert own(silent) == []


def test_no_test_is_a_mock_of_our_own_classes() -> None:
    """Fakes stand at the edge of Flower, of the model or of the clock."""
    found = [
        path
        for path in tracked("tests/*.py")
        if re.search(r"^(import|from) (unittest\.)?mock", path.read_text(), re.M)
    ]
    assert own(found) == []


TEXT = (
    "*.py",
    "*.md",
    "*.toml",
    "*.yaml",
    "*.yml",
    "*.txt",
    "Makefile",
    ".ci/*",
    ".gitignore",
    "*.cfg",
    "*.json",
)
HOMES = "|".join(("home", "root", "Users", "work", "mnt"))
MACHINE = re.compile(rf"(?<![\w.])/(?:{HOMES})/\w|[A-Z]:[\\/]+Users")


def test_no_text_names_a_place_on_one_machine() -> None:
    assert MACHINE.search("see " + "/home" + "/me/x"), "the pattern finds what it looks for"
    found = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked(*TEXT)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE.search(line)
    }
    assert found == set()


def test_hooks_of_strategies_and_clients_are_no_generators() -> None:
    """Flower's HTTP grid iterates over messages twice."""
    hooks = {
        "configure_train",
        "configure_evaluate",
        "aggregate_train",
        "aggregate_evaluate",
        "messages_for",
    }
    seen = set()
    for module in modules():
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in hooks:
                seen.add(node.name)
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Yield | ast.YieldFrom)]
                assert not inner, f"{module.name}: {node.name}"
    assert seen == hooks


def called(tree: ast.AST) -> set[str]:
    """Names of everything that a module calls or imports, as it is written."""
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    imports = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    origins = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return calls | imports | origins


def test_nothing_is_unpickled_and_nothing_is_imported_by_name() -> None:
    forbidden = {
        "pickle",
        "cloudpickle",
        "torch.load",
        "eval",
        "exec",
        "__import__",
        "importlib.import_module",
    }
    assert "torch.load" in called(ast.parse("import torch\ntorch.load(x)"))
    found = {
        str(m.relative_to(ROOT)): called(ast.parse(m.read_text())) & forbidden for m in modules()
    }
    assert {name: names for name, names in found.items() if names} == {}
