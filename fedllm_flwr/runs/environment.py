"""Where a run happened: what a person needs to judge its numbers and to repeat them."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr import __version__

VERSIONED = ("flwr", "torch", "transformers", "peft", "ray", "hydra-core", "numpy", "safetensors")


def environment() -> dict[str, Any]:
    """Where this process runs, for the manifest; takes some milliseconds and starts ``git`` when it is there.

    Returns:
        ``versions`` by distribution (those installed), ``python``, ``platform``, ``cpu`` (model), ``cpu_count`` (those
        this process may use), ``memory_bytes`` (of the machine), ``commit`` (with ``-dirty`` when tracked files were
        changed; None when this code is not tracked by a git checkout) and ``command``, as typed.
    """
    return {
        "versions": {"fedllm-flwr": __version__} | _installed_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "commit": _commit(Path(__file__).resolve()),
        "command": _command(sys.orig_argv, sys.argv[0]),
    }


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _commit(source: Path) -> str | None:
    """The commit of the checkout that tracks a source file.

    An installed copy may lie inside somebody else's checkout (a virtual environment usually does), whose commit says
    nothing about this code; so the file must be tracked there.
    """
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = _git(source.parent, "rev-parse", "HEAD")
    changed = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _command(typed: Sequence[str], program: str) -> str:
    """The command line without the folders of the interpreter and of installed programs.

    Args:
        typed: All that was executed, the interpreter first (``sys.orig_argv``).
        program: What Python runs (``sys.argv[0]``).
    """
    interpreter, *rest = typed
    if rest and rest[0] == program and not program.endswith(".py"):
        return shlex.join([Path(program).name, *rest[1:]])
    return shlex.join([Path(interpreter).name, *rest])
