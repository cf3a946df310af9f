"""Runs of a sweep: what each came to, which settings differ, and which runs differ in their seed only."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from fedllm_flwr.errors import FedLLMError
from fedllm_flwr.runs.breakdown import method_bytes
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.snapshot import Snapshot
from fedllm_flwr.runs.units import human_figure

QUALITIES = (
    "accuracy",
    "mean_client_accuracy",
    "worst_client_accuracy",
    "worst_decile_accuracy",
    "worst_group_accuracy",
    "validation_accuracy",
    "bits_per_character",
    "loss",
)
COSTS = ("uplink_bytes", "downlink_bytes", "seconds")
NOT_A_SETTING = frozenset({"seed", "out_dir"})
"""The seed makes groups; where a run was written says nothing about it."""


@dataclass(frozen=True)
class Row:
    """One run of a comparison.

    Attributes:
        name: The run's path below the folder that all runs share.
        status: ``finished``, how far it came, or why it cannot be read.
        config: Its configuration with dotted keys; empty when it cannot be read.
        figures: Those of ``QUALITIES`` and ``COSTS`` that it has; of an unfinished run, the latest.
    """

    name: str
    status: str
    config: dict[str, Any]
    figures: dict[str, float]

    @property
    def seed(self) -> str:
        """The run's seed as text; empty when unknown."""
        return str(self.config.get("seed", ""))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        settings: The values of the keys that differ between groups.
        runs: All of them, finished or not.
    """

    settings: dict[str, Any]
    runs: list[Row]

    @property
    def finished(self) -> list[Row]:
        """The runs that means are taken over."""
        return [row for row in self.runs if row.status == "finished"]

    @property
    def label(self) -> str:
        """The settings in one line."""
        return (
            ", ".join(f"{key}={human_figure(value)}" for key, value in self.settings.items())
            or "all runs"
        )

    def mean(self, figure: str) -> tuple[float, float] | None:
        """Mean and standard deviation (n - 1) of a figure over the finished runs; the deviation of one run is 0."""
        values = [row.figures[figure] for row in self.finished if figure in row.figures]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def interval(self, figure: str) -> tuple[float, float] | None:
        """The 95 % interval of a figure's mean over seeds (Student's t), an accuracy's cut at 0 and 1.

        None below two finished runs.
        """
        values = [row.figures[figure] for row in self.finished if figure in row.figures]
        if len(values) < 2:
            return None
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        half = float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))
        low, high = mean - half, mean + half
        return (max(low, 0.0), min(high, 1.0)) if figure.endswith("accuracy") else (low, high)


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """One row per path, in the order given, whatever state the run is in."""
    resolved = [path.resolve() for path in paths]
    parents = [set(path.parents) for path in resolved]
    shared = (
        max(set.intersection(*parents), key=lambda path: len(path.parts), default=Path("/"))
        if parents
        else Path("/")
    )
    return [_row(path, str(path.relative_to(shared))) for path in resolved]


def differing_keys(rows: Sequence[Row]) -> list[str]:
    """Dotted configuration keys whose value is not the same in all runs that can be read, the seed aside.

    Where whole experiments are compared, keys that follow from the experiment's name are left out: the name says it.
    """
    configs = [row.config for row in rows if row.config]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_A_SETTING)
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    if "experiment" in differing:
        return [
            "experiment",
            *(key for key in differing if not _follows(key, configs, "experiment")),
        ]
    return differing


def make_groups(rows: Sequence[Row], keys: Sequence[str]) -> list[Group]:
    """Runs that agree in all differing keys, in order of first appearance; runs that cannot be read are in none."""
    groups: dict[str, Group] = {}
    for row in rows:
        if row.config:
            settings = {key: row.config.get(key) for key in keys}
            groups.setdefault(repr(settings), Group(settings, [])).runs.append(row)
    return list(groups.values())


def _row(path: Path, name: str) -> Row:
    try:
        snapshot = Snapshot.read(RunDirectory.open(path))
    except FedLLMError as error:
        return Row(name, f"cannot be read ({error})", {}, {})
    latest = snapshot.rounds[-1] if snapshot.rounds else {}
    reported = next((r for r in snapshot.rounds if r["round"] == snapshot.reported_round), latest)
    figures = {key: reported[key] for key in QUALITIES if key in reported}
    if snapshot.rounds:
        figures["seconds"] = sum(record.get("seconds", 0.0) for record in snapshot.rounds)
        figures |= {f"{way}_bytes": method_bytes(snapshot, way) for way in ("uplink", "downlink")}
    figures |= {
        key: snapshot.summary[key] for key in (*QUALITIES, *COSTS) if key in snapshot.summary
    }
    config = {"experiment": snapshot.experiment} | snapshot.config
    return Row(name, snapshot.status, config, figures)


def _follows(key: str, configs: Sequence[dict[str, Any]], leader: str) -> bool:
    """Whether a key has one value for each value of another, and so adds nothing beside it."""
    values = defaultdict(set)
    for config in configs:
        values[repr(config.get(leader))].add(repr(config.get(key)))
    return all(len(found) == 1 for found in values.values())
