"""One reading of a run directory: everything that is shown comes from a snapshot, so all of it agrees."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedllm_flwr.runs.directory import RunDirectory

Record = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What a run has left behind so far.

    Attributes:
        path: The run directory.
        manifest: See :meth:`RunDirectory.create`.
        summary: The final figures; empty when the run is not finished.
        records: All records in the order written, without the keys whose value is null.
    """

    path: Path
    manifest: Record
    summary: Record
    records: list[Record]

    @classmethod
    def read(cls, run: RunDirectory) -> "Snapshot":
        """Read a run once.

        Raises:
            DataError: metrics.jsonl is damaged before its last line.
        """
        records = [
            {key: value for key, value in record.items() if value is not None}
            for record in run.records()
        ]
        return cls(run.path, run.manifest, run.summary(), records)

    def of(self, kind: str) -> list[Record]:
        """The records of one kind, in the order written."""
        return [record for record in self.records if record.get("kind") == kind]

    @cached_property
    def rounds(self) -> list[Record]:
        """One record per round, by round; of a round that was repeated, the last."""
        latest = {record["round"]: record for record in self.of("round")}
        return [latest[server_round] for server_round in sorted(latest)]

    @property
    def completed_rounds(self) -> int:
        """The last round that was completed; 0 when none was."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def planned_rounds(self) -> int:
        """How many rounds the run was to have; 0 when nothing says it."""
        announced = self.rounds[-1].get("rounds", 0) if self.rounds else 0
        config = self.manifest.get("config") or {}
        return int(announced or config.get("num_rounds", 0) or self.summary.get("num_rounds", 0))

    @property
    def reported_round(self) -> int:
        """The round whose adapter is the result: the selected one, else the last that was evaluated, else 0."""
        evaluated = [r["round"] for r in self.rounds if "loss" in r or "accuracy" in r]
        return int(self.summary.get("selected_round", evaluated[-1] if evaluated else 0))

    @property
    def status(self) -> str:
        """``finished``, or how far the run came; whether it stopped or still goes on, its files cannot tell."""
        if self.summary:
            return "finished"
        planned = f" of {self.planned_rounds}" if self.planned_rounds else ""
        return f"unfinished ({self.completed_rounds}{planned} rounds)"

    @property
    def experiment(self) -> str:
        """The experiment's name; the folder's when the manifest has none."""
        return str(
            self.manifest.get("experiment") or self.config.get("experiment") or self.path.name
        )

    @property
    def method(self) -> str:
        """The method's name, such as ``fedlora``."""
        return str(self.summary.get("method") or self.config.get("method.name") or "federated")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed configuration with dotted keys, such as ``method.rank``."""
        return flatten(self.manifest.get("config") or {})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys; lists become JSON text, so that every value can be compared.

    Example:
        ``flatten({"method": {"rank": 8}}) == {"method.rank": 8}``
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat
