"""The Flower App Bundle: build it as `flwr run` does, and show that it is whole, lean, and runs on its own.

    python -m benchmarks.fab <folder>

builds the FAB of this checkout into the folder with `flwr build`, and checks that it holds every Python file of the
three packages, every configuration file, README, LICENSE and pyproject.toml, and nothing else; that it is below
Flower's 10 MB; that building leaves pyproject.toml alone; and that a fresh interpreter which finds the project in the
unpacked FAB only loads both apps and composes an experiment. The last line is the verdict; exit code 0 or 1.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from flwr.cli.install import install_from_fab

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedllm_flwr", "clients", "strategies")
LIMIT_BYTES = 10_000_000
LEGAL_FOLDER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What `flwr build` accepts as the name of an app's folder; the package's own name is not legal."""

PROBE = """
import importlib, json, sys
for reference in sys.argv[1:]:
    module, _, name = reference.partition(":")
    getattr(importlib.import_module(module), name)
import clients.handlers  # the client's app imports it with its first message
from fedllm_flwr.compose import CONF, compose_run
config = compose_run(["experiment=smoke"]).config
project = ("fedllm_flwr", "clients", "strategies")
files = {n: m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in project}
print(json.dumps({"experiment": config.experiment, "conf": str(CONF), "files": files}))
"""


class FabError(Exception):
    """The FAB is not what it must be; one line."""


def expected_files(root: Path) -> set[str]:
    """What a FAB of a checkout must hold, as paths within it."""
    found = {"pyproject.toml", "README.md", "LICENSE"}
    patterns = [*((package, "*.py") for package in PACKAGES), ("conf", "*.py"), ("conf", "*.yaml")]
    for folder, pattern in patterns:
        found |= {str(path.relative_to(root)) for path in (root / folder).rglob(pattern)}
    return found


def build(root: Path, folder: Path) -> Path:
    """Build the FAB of a checkout into a folder with Flower's command line.

    Returns:
        The FAB.

    Raises:
        FabError: Flower refuses, warns that something is missing, or changes pyproject.toml.
    """
    before = (root / "pyproject.toml").read_bytes()
    with tempfile.TemporaryDirectory() as neutral:
        app = root
        if not LEGAL_FOLDER.fullmatch(root.name):
            app = Path(neutral) / "fedllm-flwr"
            shutil.copytree(root, app, ignore=shutil.ignore_patterns(".*", "outputs", "multirun"))
            shutil.copy(root / ".gitignore", app)
        done = run_flwr("build", "--app", str(app), folder=folder)
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode or "missing" in said:
        raise FabError(f"flwr build: {said}")
    if (root / "pyproject.toml").read_bytes() != before:
        raise FabError("flwr build: it rewrote pyproject.toml")
    fabs = list(folder.glob("*.fab"))
    if len(fabs) != 1:
        raise FabError(f"expected one FAB in {folder}, got {[fab.name for fab in fabs]}")
    return fabs[0]


def run_flwr(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Flower's command line from a folder that is also its home, without network."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), *arguments],
        cwd=folder,
        env=os.environ | quiet | {"FLWR_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def bundle(root: Path, folder: Path) -> tuple[Path, str]:
    """Build the FAB of a checkout, unpack it as Flower does, and compare it with the checkout.

    Args:
        root: The checkout.
        folder: An empty folder, for the FAB and the files unpacked from it.

    Returns:
        The folder of the unpacked files, and a line about them.

    Raises:
        FabError: A file is missing or is not wanted, or the FAB is too large.
    """
    fab = build(root, folder)
    if fab.stat().st_size >= LIMIT_BYTES:
        raise FabError(f"expected less than {LIMIT_BYTES:,} bytes, got {fab.stat().st_size:,}")
    with contextlib.redirect_stdout(io.StringIO()):
        unpacked = install_from_fab(fab, folder / "installed", skip_prompt=True)
    found = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    wanted = expected_files(root)
    for trouble, paths in (("lacks", wanted - found), ("should not hold", found - wanted)):
        if paths:
            raise FabError(f"the FAB {trouble} {', '.join(sorted(paths))}")
    return unpacked, f"{fab.name}: {len(found)} files, {fab.stat().st_size / 1e6:.2f} MB, whole"


def check_loads(unpacked: Path) -> None:
    """Load both apps and compose an experiment in an interpreter that must find the project in the FAB.

    Raises:
        FabError: Something does not load, or loads from elsewhere.
    """
    project = tomllib.loads((unpacked / "pyproject.toml").read_text())
    components = project["tool"]["flwr"]["app"]["components"]
    with tempfile.TemporaryDirectory() as neutral:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *components.values()],
            cwd=neutral,
            env=os.environ | {"PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise FabError(f"the unpacked FAB does not load: {done.stderr.strip().splitlines()[-1]}")
    loaded = json.loads(done.stdout.splitlines()[-1])
    places = {"conf": loaded["conf"], **loaded["files"]}
    inside = str(unpacked.resolve()) + os.sep
    foreign = [
        f"{name} from {place}"
        for name, place in places.items()
        if not str(place).startswith(inside)
    ]
    if foreign or len(components) != 2:
        raise FabError(f"expected two apps from {unpacked} alone, got {', '.join(foreign)}")


def check(root: Path, folder: Path) -> str:
    """Bundle a checkout and load the apps from the result; arguments as in :func:`bundle`.

    Returns:
        The verdict, one line.

    Raises:
        FabError: What is wrong.
    """
    unpacked, line = bundle(root, folder)
    check_loads(unpacked)
    return f"{line}; both apps load from it alone"


def main() -> int:
    """Check this checkout's FAB and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an empty folder for the FAB")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(check(ROOT, folder))
    except FabError as error:
        print(f"FAB: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
