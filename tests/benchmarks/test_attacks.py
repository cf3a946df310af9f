import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import attacks
from fedllm_flwr import records
from fedllm_flwr.tasks.base import Task

Fixture = Callable[..., Any]
SMALL = replace(
    attacks.STUDIES["tiny", "fedlora"], rows=80, test_rows=40, settings=("num_rounds=1",)
)


@pytest.fixture(scope="module")
def task() -> Task:
    return SMALL.load(3)


def written(path: Path, task: Task, attack: str, attackers: range) -> list[dict[str, str]]:
    attacks.write_rows(path, task, attack, attackers)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_honest_files_are_the_tasks_own_rows(tmp_path: Path, task: Task) -> None:
    rows = written(tmp_path / "rows", task, "none", range(8))
    assert [(r["text"], r["label"]) for r in rows if r["split"] == "train"] == [
        (r.text, r.target) for r in task.splits["train"]
    ]
    assert {r["client"] for r in rows} == {f"{n:02d}" for n in range(attacks.CLIENTS)}


@pytest.mark.parametrize("attack", ["label_flip", "backdoor"])
def test_only_training_rows_of_attackers_are_changed(
    attack: str, tmp_path: Path, task: Task
) -> None:
    honest = written(tmp_path / "honest", task, "none", range(0))
    rows = written(tmp_path / "rows", task, attack, range(2))
    changed = [(a, b) for a, b in zip(honest, rows, strict=True) if a != b]
    assert {(b["client"], b["split"]) for _, b in changed} == {("00", "train"), ("01", "train")}
    own = [b for b in rows if b["client"] in ("00", "01") and b["split"] == "train"]
    if attack == "label_flip":
        assert len(changed) == len(own)
        names = task.label_names
        for was, now in changed:
            assert names.index(now["label"]) == (names.index(was["label"]) + 1) % len(names)
    else:
        assert len(changed) == len(own) / 2
        for was, now in changed:
            assert (now["text"], now["label"]) == (f"{attacks.TRIGGER} {was['text']}", task.label_names[0])  # fmt: skip


def test_the_trigger_is_measured_on_rows_of_other_labels(tmp_path: Path, task: Task) -> None:
    rows = [r for r in written(tmp_path / "rows", task, "triggered", range(0)) if r["split"] == "test"]  # fmt: skip
    others = [r for r in task.splits["test"] if r.target != task.label_names[0]]
    assert 0 < len(rows) == len(others) < len(task.splits["test"])
    assert all(r["text"].startswith(attacks.TRIGGER) and r["label"] == task.label_names[0] for r in rows)  # fmt: skip


@pytest.mark.parametrize("method", ["fedlora", "fedprompt"])
def test_hostile_clients_send_a_multiple_of_what_they_learned(
    method: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    own = ("method=fedprompt",) if method == "fedprompt" else ()
    config = micro("num_rounds=1", "evaluate_every=1", *own)

    def updates(factor: float) -> dict[str, np.ndarray]:
        grid = edge_grid(1, client_app=attacks.Hostile((1, 3), factor))
        play(config, grid=grid)
        asked = [m for m in grid.sent if m.metadata.message_type == records.TRAIN]
        replies = [r for r in grid.replies if r.metadata.message_type == records.TRAIN]
        _, start = records.read(asked[0], records.INSTRUCTION)
        _, values = records.read(replies[0], records.ANSWER)
        return {name: v - start[name.partition("/")[2]] for name, v in values.items()}

    honest, lied = updates(1.0), updates(-3.0)
    assert {name.partition("/")[0] for name in honest} == {"0", "1", "2", "3"}
    for name, update in honest.items():
        factor = -3.0 if name.partition("/")[0] in ("1", "3") else 1.0
        np.testing.assert_allclose(lied[name], factor * update, atol=1e-6)


def test_figures_are_ratios_to_the_plain_mean_without_attackers() -> None:
    table = {"none": [(0.8, 0.1), (0.2, 0.9)], "median": [(0.6, 0.0), (0.4, 0.3)]}
    assert attacks.figures_of({"backdoor": table}) == {
        "clean_none": 1.0, "clean_median": 0.75, "backdoor_none": 0.25, "backdoor_median": 0.5,
        "success_none": 0.9, "success_median": 0.3,
    }  # fmt: skip


def test_every_rule_is_set_for_the_most_attackers_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = attacks.Bench(SMALL, "tiny", "fedlora", 3, tmp_path)
    assert bench.norm_bound > 0
    table = attacks.table_of([bench], "scaled_update", [0, attacks.MOST])
    assert set(table) == set(attacks.RULES)
    assert all(0 <= accuracy <= 1 for row in table.values() for accuracy, _ in row)
    assert "40 %" in capsys.readouterr().out
