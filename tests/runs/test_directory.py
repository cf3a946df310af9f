import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.runs.directory import METRICS, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(
        tmp_path / "outputs" / "run", {"experiment": "small", "config": {"seed": 3}}
    )


def test_a_manifest_comes_back(run: RunDirectory) -> None:
    again = RunDirectory.open(run.path)
    assert again.manifest == run.manifest == {"experiment": "small", "config": {"seed": 3}}
    assert again.records() == []
    assert again.summary() == {}
    assert not again.is_finished


def test_a_folder_with_other_files_may_become_a_run_but_only_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory.create(tmp_path, {})
    with pytest.raises(ConfigError, match="already holds a run: expected a new folder"):
        RunDirectory.create(tmp_path, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "it holds no manifest.json"),
        (b"", "manifest.json is not JSON"),
        (b'{"experiment": "sm', "manifest.json is not JSON"),
        (b"\xff\xfe{}", "manifest.json is not JSON"),
        (b"[1]", "manifest.json holds no object"),
    ],
)
def test_anything_else_is_refused_in_one_line(
    tmp_path: Path, manifest: bytes | None, message: str
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest)
    before = os.listdir(tmp_path)
    with pytest.raises(ConfigError, match=f"is not a run directory: {message}") as caught:
        RunDirectory.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == before


def test_an_absent_folder_and_a_file_are_no_run_directories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(ConfigError, match="is not a run directory: there is no such folder"):
            RunDirectory.open(tmp_path / name)


def test_records_come_back_in_order_and_by_kind(run: RunDirectory) -> None:
    records = [
        {"kind": "round", "round": 0, "accuracy": np.float32(0.5)},
        {"kind": "event", "text": "line\nbreak, ünïcode and \u2028"},
        {"kind": "round", "round": 1, "loss": float("nan"), "cohort": (0, 3)},
    ]
    for record in records:
        run.append(record)
    run.sync()
    assert run.records("event") == [records[1]]
    assert run.records() == [
        {"kind": "round", "round": 0, "accuracy": 0.5},
        records[1],
        {"kind": "round", "round": 1, "loss": None, "cohort": [0, 3]},
    ]
    assert (run.path / METRICS).read_bytes().count(b"\n") == 3


def test_sync_without_records_does_nothing(run: RunDirectory) -> None:
    run.sync()
    assert not (run.path / METRICS).exists()


def test_a_record_that_json_cannot_hold_writes_nothing(run: RunDirectory) -> None:
    with pytest.raises(TypeError, match="ndarray"):
        run.append({"kind": "round", "round": 1, "arrays": np.zeros(2)})
    assert run.records() == []


@settings(deadline=None)
@given(cut=st.integers(0, 200))
def test_however_a_kill_tears_the_file_whole_lines_survive(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    run = RunDirectory.create(tmp_path_factory.mktemp("torn"), {})
    for number in range(5):
        run.append({"kind": "round", "round": number, "text": "é" * number})
    content = (run.path / METRICS).read_bytes()
    (run.path / METRICS).write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    again = RunDirectory.open(run.path)
    assert [r["round"] for r in again.records()] == list(range(whole))
    again.append({"kind": "event", "text": "after"})
    assert [r["kind"] for r in again.records()] == ["round"] * whole + ["event"]


def test_a_torn_line_that_happens_to_be_json_does_not_count(run: RunDirectory) -> None:
    (run.path / METRICS).write_bytes(
        b'{"kind": "round", "round": 1}\n{"kind": "round", "round": 2}'
    )
    assert [r["round"] for r in run.records()] == [1]


def test_damage_before_the_last_line_is_named(run: RunDirectory) -> None:
    (run.path / METRICS).write_bytes(b'{"kind": "event"}\n\x00\x00\x00\n{"kind": "event"}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: expected one JSON object"):
        run.records()


def test_a_resume_forgets_later_rounds_and_damage_only(run: RunDirectory) -> None:
    run.append({"kind": "baseline", "name": "majority"})
    for number in range(4):
        run.append({"kind": "round", "round": number})
        run.append({"kind": "client", "round": number, "partition_id": 0})
    run.append({"kind": "event", "text": "no round"})
    content = (run.path / METRICS).read_bytes()
    (run.path / METRICS).write_bytes(
        content.replace(b'{"kind": "event"', b'torn\n[1]\n{"kind": "event"') + b'{"ro'
    )
    run.truncate_after(1)
    assert [(r["kind"], r.get("round")) for r in run.records()] == [
        ("baseline", None),
        ("round", 0),
        ("client", 0),
        ("round", 1),
        ("client", 1),
        ("event", None),
    ]
    run.append({"kind": "round", "round": 2})
    assert run.records()[-1] == {"kind": "round", "round": 2}
    assert sorted(os.listdir(run.path)) == ["manifest.json", "metrics.jsonl"]


def test_forgetting_all_rounds_keeps_what_belongs_to_none(run: RunDirectory) -> None:
    for record in (
        {"kind": "baseline", "name": "majority"},
        {"kind": "round", "round": 0},
        {"kind": "event", "round": None},
    ):
        run.append(record)
    run.truncate_after(-1)
    assert [record["kind"] for record in run.records()] == ["baseline", "event"]


def test_truncation_keeps_the_bytes_of_what_stays(run: RunDirectory) -> None:
    lines = b'{"round":1,  "kind":"round","x":1.00}\n{"kind": "event"}\n'
    (run.path / METRICS).write_bytes(lines + b'{"kind": "round", "round": 2}\n')
    run.truncate_after(1)
    assert (run.path / METRICS).read_bytes() == lines
    run.truncate_after(1)
    assert (run.path / METRICS).read_bytes() == lines


def test_truncating_nothing_makes_no_file(run: RunDirectory) -> None:
    run.truncate_after(0)
    assert not (run.path / METRICS).exists()


def test_a_reader_beside_the_writer_sees_whole_records_only(run: RunDirectory) -> None:
    def write() -> None:
        for number in range(300):
            run.append({"kind": "round", "round": number, "filler": "x" * number})

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(len(RunDirectory.open(run.path).records("round")))
    writer.join()
    assert seen == sorted(seen)
    assert len(run.records("round")) == 300


def test_a_summary_is_flat_and_what_does_not_apply_is_absent(run: RunDirectory) -> None:
    run.write_summary(
        {
            "accuracy": np.float32(0.5),
            "epsilon": None,
            "method": "fedlora",
            "num_rounds": np.int64(4),
        }
    )
    text = json.loads((run.path / "summary.json").read_text())
    assert text == run.summary() == {"accuracy": 0.5, "method": "fedlora", "num_rounds": 4}
    assert run.is_finished


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "summary: loss is nan: expected a finite number"),
        (np.float32("inf"), "summary: loss is inf: expected a finite number"),
        ([1.0], "summary: loss is a list: expected text, a boolean or a number"),
        ({"mean": 1.0}, "summary: loss is a dict"),
        (np.zeros(2), "summary: loss is a ndarray"),
    ],
)
def test_a_summary_refuses_what_is_not_flat_or_finite(
    run: RunDirectory, value: object, message: str
) -> None:
    run.write_summary({"accuracy": 0.25})
    with pytest.raises(ValueError, match=message):
        run.write_summary({"accuracy": 0.5, "loss": value})
    assert run.summary() == {"accuracy": 0.25}


@pytest.mark.parametrize("content", ["", "[]", '{"accuracy": '])
def test_a_damaged_summary_is_named(run: RunDirectory, content: str) -> None:
    (run.path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=r"summary\.json: expected one JSON object"):
        run.summary()
