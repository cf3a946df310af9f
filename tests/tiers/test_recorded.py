from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.cascade import TOKENS, recording, replay
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tiers import recorded
from fedllm_flwr.tiers.recorded import record_lines, timed_lines

Fixture = Callable[..., Any]


def test_everybody_answers_everything(
    task: Task, tier: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "QUERIES_AT_ONCE", 5)
    tiers = (tier("a", 1, 2), tier("b", 3))
    rows = task.splits["test"]
    said: list[str] = []
    lines = list(record_lines(tiers, task, rows, said.append))
    assert len(lines) == 3 * len(rows)
    found = recording(enumerate(lines, start=1), "x")
    assert found.queries == tuple(row.row_id for row in rows)
    assert list(found.tiers) == ["a", "b"]
    assert said[-1] == f"tier b: {len(rows)} of {len(rows)} queries"


def test_clones_agree_and_say_nothing(task: Task, tier: Fixture) -> None:
    tiers = (tier("a", 2, 2, 2), tier("b", 3))
    lines = enumerate(record_lines(tiers, task, task.splits["test"]), start=1)
    rows = replay(recording(lines, "x"), {"a": TOKENS, "b": TOKENS})
    signal = next(row for row in rows if row["table"] == "signals" and row["tier"] == "a")
    assert signal["auroc"] == pytest.approx(0.5, abs=0.05)
    assert signal["error_correlation"] == pytest.approx(1.0)


def test_queries_that_come_alone_are_timed_and_answered_alike(task: Task, tier: Fixture) -> None:
    """In float32 a query gets the same answer alone; k samples of one member are one call."""
    sampled = tier("s", 1, kind="self_consistency", samples=3, temperature=1.0)
    tiers = (tier("a", 1, 2), sampled, tier("b", 3))
    rows = task.splits["test"][:4]
    lines = list(timed_lines(tiers, task, rows))
    plain = [dict(line) for line in record_lines(tiers, task, rows)]
    for line, other in zip(lines, plain, strict=True):
        timed = {key: value for key, value in line.items() if key not in ("seconds", "score")}
        assert timed == {key: value for key, value in other.items() if key != "score"}
        assert (line["seconds"] > 0) == (line["tier"] != "s" or line["member"] == "m1#1")
    read = recording(list(enumerate(lines, start=1)), "x")
    row = replay(read, dict.fromkeys("asb", TOKENS))[0]
    assert 0 < row["p50_parallel_seconds"] <= row["p50_serial_seconds"] <= row["p99_serial_seconds"]
