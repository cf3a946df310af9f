import csv
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fedllm_flwr.runs.compare import compare


@pytest.fixture
def sweep(make_run, tmp_path) -> list[Path]:
    """Two ranks with three seeds each, one of which stopped, and a path that is no run."""
    runs = [
        make_run(f"rank{rank}-seed{seed}", seed=seed, offset=0.0625 * (seed - 2), clients=4, rounds=3,
                 finished=(rank, seed) != (8, 3), method={"name": "fedlora", "rank": rank})
        for rank in (4, 8)
        for seed in (1, 2, 3)
    ]  # fmt: skip
    return [*(run.path for run in runs), tmp_path / "never-started"]


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    return [
        [[c.strip() for c in line.strip("|").split("|")] for line in block.strip().splitlines()]
        for block in blocks
    ]


def test_a_sweep_leaves_tables_and_a_plot(sweep: list[Path], tmp_path: Path, capsys) -> None:
    path = compare(sweep, tmp_path / "out" / "deep")
    assert path == tmp_path / "out" / "deep" / "comparison.md"
    assert sorted(os.listdir(path.parent)) == [
        "comparison.csv",
        "comparison.md",
        "comparison.png",
        "comparison.svg",
    ]
    groups, runs = markdown_tables(path.read_text())
    header = ["#", "method.rank", "n", "accuracy", "worst client accuracy", "validation accuracy", "loss", "uplink",
              "downlink", "time"]  # fmt: skip
    assert groups[0] == header
    assert [row[:4] for row in groups[2:]] == [
        ["1", "4", "3", "0.875 ± 0.062 (0.720 to 1.000)"],
        ["2", "8", "2 of 3", "0.844 ± 0.044 (0.447 to 1.000)"],
    ]
    assert runs[0][:4] == ["run", "status", "seed", "accuracy"]
    assert [row[:4] for row in runs[-2:]] == [
        ["rank8-seed3", "unfinished (3 of 4 rounds)", "3", "0.938"],
        ["never-started", runs[-1][1], "", "–"],
    ]
    assert "Not counted: rank8-seed3: unfinished (3 of 4 rounds)." in path.read_text()
    assert "Not counted: never-started: cannot be read" in path.read_text()
    assert "![quality against uplink bytes](comparison.svg)" in path.read_text()
    out = capsys.readouterr().out
    assert "0.875 ± 0.062" in out
    assert "Not counted: rank8-seed3" in out
    assert "\x1b" not in out


def test_the_csv_has_a_line_per_run_in_full_precision(
    sweep: list[Path], tmp_path: Path, capsys
) -> None:
    path = compare(sweep, tmp_path / "out")
    with (path.parent / "comparison.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["run"] for row in rows] == [p.name for p in sweep]
    assert [row["seed"] for row in rows] == ["1", "2", "3"] * 2 + [""]
    assert float(rows[0]["accuracy"]) == 0.8125
    assert rows[0]["uplink_bytes"] == str(800 + 3 * 4_000_800)
    assert rows[-1]["accuracy"] == ""


def test_the_plot_shows_each_group_with_its_number(
    sweep: list[Path], tmp_path: Path, capsys
) -> None:
    path = compare(sweep, tmp_path / "out")
    root = ET.parse(path.parent / "comparison.svg").getroot()  # noqa: S314
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"1", "2", "1  method.rank=4  (n=3)", "2  method.rank=8  (n=2)", "accuracy"} <= set(
        texts
    )


def test_runs_without_accuracy_are_compared_by_loss(make_run, tmp_path: Path, capsys) -> None:
    run = make_run(rounds=None, finished=False, baselines=False)
    run.append({"kind": "round", "round": 1, "rounds": 1, "loss": 2.5, "uplink_bytes": 10})
    run.write_summary({"loss": 2.5})
    path = compare([run.path], tmp_path / "out")
    groups, _ = markdown_tables(path.read_text())
    assert groups[0] == ["#", "n", "loss", "uplink", "downlink", "time"]
    assert groups[2] == ["1", "1", "2.500", "10 B", "0 B", "0 s"]
    assert (path.parent / "comparison.svg").exists()


def test_nothing_finished_leaves_tables_without_a_plot(make_run, tmp_path: Path, capsys) -> None:
    compare([make_run("a").path], tmp_path / "out")
    path = compare(
        [make_run("b", rounds=1, finished=False).path, tmp_path / "none"], tmp_path / "out"
    )
    assert sorted(os.listdir(path.parent)) == ["comparison.csv", "comparison.md"]
    assert "comparison.svg" not in path.read_text()
    groups, runs = markdown_tables(path.read_text())
    assert groups[2][:3] == ["1", "0 of 1", "–"]
    assert runs[2][3] == "0.500"


def test_a_bar_in_a_setting_does_not_break_the_table(make_run, tmp_path: Path, capsys) -> None:
    runs = [make_run(name, task={"template": name}) for name in ("a|b", "c")]
    path = compare([run.path for run in runs], tmp_path / "out")
    assert "a\\|b" in path.read_text()
