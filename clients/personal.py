"""What a client keeps, such as its personal prompt: in the node's Flower context, and on its disk if a folder is given.

Flower's context belongs to one run: a run that is resumed starts with an empty one, and a SuperNode that dies loses
its own. So a node may name a folder (node config ``state-path``, or an environment variable), and what a client keeps
is also written there. It never enters a message.

The values after the last rounds are kept: a round that is asked for again, after a lost reply or a kill,
must begin where it began the first time.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from fedllm_flwr.errors import WireError
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.settings.runtime import STATE_PATH_VARIABLE

KEPT = 2
"""Versions in Flower's context, which travels with every message; on disk there are as many as checkpoints, and one."""
PERSONAL = "personal"
_FILE = re.compile(r"round-(\d+)\.f32")


@dataclass(frozen=True)
class PersonalStore:
    """One kind of values of the clients that a node hosts, for one run; by default their personal prompts.

    Attributes:
        context: The node's.
        run: The run's name, which the server draws and keeps over resumes; values of another run are not read, also
            not of one with the same settings, which may have had other data.
        kept: Versions on disk: a run may be resumed from any of its checkpoints.
        kind: What is kept; kinds know nothing of each other.
    """

    context: Context
    run: str
    kept: int = KEPT
    kind: str = PERSONAL

    def load(self, partition_id: int, before_round: int) -> np.ndarray | None:
        """A client's newest value from a round before this one; None for a client that has not trained.

        Args:
            partition_id: The client.
            before_round: The round that is about to begin.
        """
        versions = self._in_context(partition_id)
        if not any(r < before_round for r in versions):
            versions = self._on_disk(partition_id)
        rounds = [r for r in versions if r < before_round]
        return versions[max(rounds)] if rounds else None

    def save(self, partition_id: int, server_round: int, values: np.ndarray) -> None:
        """Keep a client's value after a round, and the one before; later ones, of a repeated round, are dropped."""
        versions = self._in_context(partition_id) or self._on_disk(partition_id)
        kept = {r: v for r, v in versions.items() if r < server_round} | {server_round: values}
        newest = sorted(kept)[-KEPT:]
        arrays = {f"{r}": Array(np.ascontiguousarray(kept[r], dtype=np.float32)) for r in newest}
        self.context.state[f"{self.kind}/{partition_id}"] = ArrayRecord(arrays)
        self.context.state[f"{self.kind}-of/{partition_id}"] = ConfigRecord({"run": self.run})  # fmt: skip
        folder = self._folder(partition_id)
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stored = self._files(folder)
        older = [r for r in stored if r < server_round]
        for old in stored:
            if old > server_round or old in older[: max(0, len(older) + 1 - self.kept)]:
                (folder / f"round-{old}.f32").unlink(missing_ok=True)
        write_bytes(folder / f"round-{server_round}.f32", values.astype("<f4").tobytes())

    def _in_context(self, partition_id: int) -> dict[int, np.ndarray]:
        owner = self.context.state.get(f"{self.kind}-of/{partition_id}")
        if owner is None or owner["run"] != self.run:
            return {}
        arrays = self.context.state[f"{self.kind}/{partition_id}"]
        return {int(name): array.numpy() for name, array in arrays.items()}  # type: ignore[union-attr]

    def _on_disk(self, partition_id: int) -> dict[int, np.ndarray]:
        folder = self._folder(partition_id)
        if folder is None:
            return {}
        return {
            r: np.frombuffer((folder / f"round-{r}.f32").read_bytes(), dtype="<f4")
            for r in self._files(folder)
        }

    def _folder(self, partition_id: int) -> Path | None:
        root = self.context.node_config.get("state-path", os.environ.get(STATE_PATH_VARIABLE, ""))
        if not root:
            return None
        folder = Path(str(root)) / _safe(self.run)
        return (folder if self.kind == PERSONAL else folder / self.kind) / str(partition_id)

    @staticmethod
    def _files(folder: Path) -> list[int]:
        if not folder.is_dir():
            return []
        return sorted(int(m[1]) for path in folder.iterdir() if (m := _FILE.fullmatch(path.name)))


def _safe(run: str) -> str:
    """The name of a run comes from the server and becomes a folder's.

    Raises:
        WireError: It is no such name.
    """
    if not re.fullmatch(r"[\w-]{1,64}", run):
        raise WireError(f"run: expected letters, digits and dashes, got {run!r:.80}")
    return run
