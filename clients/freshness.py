"""What a process that lives long must not remember: files that have changed, and models that nobody asks for any more.

A process that Flower starts for one message reads everything anew. A daemon keeps what it has read, so before each
message it looks whether the node's files are still the same.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from fedllm_flwr.models import backbone

FILES = ("data-path", "model-path")
"""Facts of a node config that name files which are read once and kept."""
PACKAGES = ("fedllm_flwr", "clients")
Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(path: str) -> Stamp:
    """Names, sizes, times of change and numbers of a file or of every file in a folder; empty if there is none."""
    root = Path(path).expanduser()
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    found = []
    for file in files:
        try:
            facts = file.stat()
        except OSError:
            continue
        found.append((str(file), facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return tuple(found)


def forget() -> None:
    """Drop every model, task and token that this process has read: all caches of this package's functions."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES:
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    backbone.reset()


class Freshness:
    """Keeps a process that handles many messages as good as a new one.

    Args:
        models: How many models may stay loaded; when there are more, all are dropped.
    """

    def __init__(self, models: int) -> None:
        self._models = models
        self._stamps: dict[str, Stamp] = {}

    def before(self, facts: Mapping[str, object]) -> None:
        """Forget what was read from files that have changed since, and undo switches of the whole process.

        Args:
            facts: The node config of the message that comes.
        """
        torch.set_float32_matmul_precision("highest")
        paths = [str(facts[name]) for name in FILES if facts.get(name)]
        found = {path: stamp(path) for path in paths}
        has_changed = any(self._stamps.get(path, now) != now for path, now in found.items())
        if has_changed:
            self._forget()
        self._stamps |= found

    def after(self) -> None:
        """Drop all models if there are too many."""
        if backbone.loaded() > self._models:
            self._forget()

    def _forget(self) -> None:
        forget()
        self._stamps.clear()
