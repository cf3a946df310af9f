"""Run directories with figures that a person can check by hand."""

from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.runs import charts, rendering
from fedllm_flwr.runs.directory import RunDirectory

ACCURACY = (0.375, 0.5, 0.75, 0.875, 0.9375)
BASELINES = (
    {"name": "majority", "accuracy": 0.4375, "worst_client_accuracy": 0.125},
    {
        "name": "bag_of_words",
        "accuracy": 0.875,
        "worst_client_accuracy": 0.75,
        "detail": "naive Bayes",
    },
    {"name": "zero_shot", "accuracy": 0.375, "loss": 1.9, "worst_client_accuracy": 0.25},
    {"name": "local_only", "accuracy": 0.8125, "loss": 0.8, "learning_rate": 1e-3},
    {"name": "centralised", "accuracy": 0.953125, "loss": 0.22, "learning_rate": 5e-4},
)


@pytest.fixture(scope="module", autouse=True)
def charts_drawn(charts_undrawn: None) -> Iterator[None]:
    """Reports as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "inline_svg", rendering.inline_svg)
        yield


MakeRun = Callable[..., RunDirectory]


def manifest(seed: int, **config: Any) -> dict[str, Any]:
    """What a run of the given configuration starts with."""
    method = {"name": "fedlora", "rank": 8, "target_modules": ["q_proj", "v_proj"]}
    return {
        "experiment": "r8_demo",
        "fingerprint": "0123456789abcdef",
        "command": "fedllm experiment=r8_demo",
        "environment": {
            "versions": {"flwr": "1.41.0"},
            "cpu": "a CPU",
            "memory_bytes": 16_000_000_000,
            "commit": None,
        },
        "config": {"experiment": "r8_demo", "seed": seed, "num_rounds": 4, "method": method}
        | config,
    }


def append_round(run: RunDirectory, server_round: int, clients: int, offset: float = 0.0) -> None:
    """All the records of one round; each client has 16 test rows."""
    accuracy = ACCURACY[server_round] + offset
    size, nothing = 1_000_000 * clients, 0 if server_round else 1
    for direction in ("uplink", "downlink"):
        for message in ("query",) if nothing else ("train", "evaluate"):
            count = 200 * clients if message != "train" else size
            run.append({"kind": "bytes", "round": server_round, "direction": direction, "message": message,
                        "bytes": count, "messages": clients})  # fmt: skip
    for partition_id in range(clients):
        if server_round:
            run.append({"kind": "client", "round": server_round, "partition_id": partition_id, "rank": 8,
                        "name": f"publisher <{partition_id}>", "loss": 1.5 / server_round, "num_examples": 64,
                        "steps": 8, "tokens": 4096, "cpu_seconds": 2.5})  # fmt: skip
        # Half of the clients are one row better than the mean and half one row worse.
        correct = round(16 * accuracy) + (1 if partition_id % 2 else -1)
        run.append({"kind": "evaluation", "round": server_round, "partition_id": partition_id, "split": "test",
                    "correct": correct, "total": 16, "loss_sum": 16 * (2.0 - accuracy)})  # fmt: skip
    figures = {"accuracy": accuracy, "loss": 2.0 - accuracy, "validation_accuracy": accuracy - 0.03,
               "worst_client_accuracy": accuracy - 1 / 16, "evaluate_seconds": 3.0, "seconds": 4.0}  # fmt: skip
    if server_round:
        figures |= {"train_loss": 1.5 / server_round, "uplink_bytes": size + 200 * clients, "dropped_replies": 0,
                    "downlink_bytes": size + 200 * clients, "train_seconds": 40.0, "aggregate_seconds": 0.5,
                    "seconds": 45.0, "server_memory_bytes": 900_000_000}  # fmt: skip
    run.append(
        {"kind": "round", "round": server_round, "rounds": 4, "num_examples": 64 * clients}
        | figures
    )


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run of four planned rounds: ``rounds`` of them done, with or without baselines and a summary."""

    def make(
        name: str = "run",
        *,
        rounds: int | None = 4,
        clients: int = 8,
        finished: bool = True,
        baselines: bool = True,
        seed: int = 1,
        offset: float = 0.0,
        **config: Any,
    ) -> RunDirectory:
        run = RunDirectory.create(tmp_path / name, manifest(seed, **config))
        for baseline in BASELINES if baselines else ():
            run.append({"kind": "baseline"} | baseline)
        for server_round in range(rounds + 1 if rounds is not None else 0):
            append_round(run, server_round, clients, offset)
        if finished:
            last = run.records("round")[-1]
            run.write_summary(
                {"experiment": "r8_demo", "method": "fedlora", "num_clients": clients, "num_rounds": 4,
                 "seconds": 184.0, "accuracy": last["accuracy"], "loss": last["loss"],
                 "fingerprint": "0123456789abcdef",
                 "worst_client_accuracy": last["worst_client_accuracy"], "dropped_replies": 0, "resumed_rounds": 0,
                 "uplink_bytes": sum(r["bytes"] for r in run.records("bytes") if r["direction"] == "uplink"),
                 "downlink_bytes": sum(r["bytes"] for r in run.records("bytes") if r["direction"] == "downlink"),
                 "adapter_sha256": "ab" * 32}
            )  # fmt: skip
        return run

    return make


class Page(HTMLParser):
    """A page read strictly: every element that is opened must be closed, in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def table(self, column: str) -> list[list[str]]:
        """The first table with a column of that name."""
        return next(table for table in self.tables if column in table[0])


@pytest.fixture
def parse_page() -> type[Page]:
    """Read a page strictly."""
    return Page
