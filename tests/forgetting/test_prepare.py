import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.forgetting.prepare import KEPT, UNLEARNED, prepare
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.sharding import members_of

Fixture = Callable[..., Any]


def test_rewinding_takes_over_what_the_client_has_not_touched(
    made: Fixture, tmp_path: Path, contents: Fixture
) -> None:
    run = prepare(read_request(made("ledger"), "3", "rewind"), tmp_path / "new")
    assert checkpoints.saved_rounds(run.checkpoints) == (0, 1, 2)
    names = set(contents(run.path))
    assert "ledger/round-0002.json" in names
    assert "ledger/round-0003.json" not in names
    assert "summary.json" not in names
    rounds = [r["round"] for r in run.records("round")]
    assert rounds == [0, 1, 2]
    assert not [r for r in run.records() if r.get("partition_id") == 3]
    told = run.manifest[UNLEARNED]
    assert (told["client"], told["method"], told["exactness"]) == (3, "rewind", "exact")
    assert not {"from", "prepare_cpu_seconds"} - set(told)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_a_round_whose_reply_of_the_client_was_dropped_is_run_again(
    copied: Fixture, tmp_path: Path
) -> None:
    """It was drawn with the others and may have shared a pass with them."""
    run = copied("ledger")
    path = run.path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "round" and line["round"] == 2:
            line["cohort"] = sorted([*line["cohort"], 3])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = read_request(RunDirectory.open(run.path), "3", "rewind")
    assert request.first_round == 3
    new = prepare(request, tmp_path / "new")
    assert checkpoints.saved_rounds(new.checkpoints) == (0, 1)
    assert new.manifest[UNLEARNED][KEPT] == 1


def test_what_was_measured_of_all_clients_is_not_taken_over(
    copied: Fixture, tmp_path: Path
) -> None:
    run = copied("ledger")
    for kind in ("baseline", "tuning", "failure", "started"):
        run.append({"kind": kind, "round": 0, "name": "local_only"})
    new = prepare(read_request(run, "3", "rewind"), tmp_path / "new")
    found = {record["kind"] for record in new.records()}
    assert {"client", "round"} <= found
    assert found.isdisjoint({"baseline", "tuning", "failure", "started"})


def test_a_folder_that_was_prepared_from_another_run_is_refused(
    made: Fixture, tmp_path: Path
) -> None:
    request = read_request(made("ledger"), "3", "rewind")
    run = prepare(request, tmp_path / "new")
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest[UNLEARNED]["from"] = "another"
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="holds another run"):
        prepare(request, tmp_path / "new")


def test_a_damaged_checkpoint_is_passed_over_for_an_earlier_one(
    copied: Fixture, tmp_path: Path
) -> None:
    run = copied("ledger")
    (run.checkpoints / "round-0002" / "arrays.safetensors").write_bytes(b"x")
    new = prepare(read_request(run, "3", "rewind"), tmp_path / "new")
    assert checkpoints.saved_rounds(new.checkpoints) == (0, 1)
    assert [r["round"] for r in new.records("round")] == [0, 1]


def test_retraining_takes_over_nothing(made: Fixture, tmp_path: Path, contents: Fixture) -> None:
    run = prepare(read_request(made("ledger"), "3", "retrain"), tmp_path / "new")
    assert sorted(contents(run.path)) == ["manifest.json", "metrics.jsonl"]
    assert run.manifest[UNLEARNED][KEPT] == -1
    assert [r["kind"] for r in run.records()] == ["event"]


def test_a_replay_has_the_old_lengths_of_the_others(made: Fixture, tmp_path: Path) -> None:
    run = prepare(read_request(made("ledger"), "0", "replay"), tmp_path / "new")
    found = {(r["of_round"], r["partition_id"]): r["length"] for r in run.records("calibration")}
    assert sorted(found) == [(2, 4), (2, 5), (3, 2), (3, 3)]
    assert min(found.values()) > 0


def test_shards_without_the_client_are_taken_over_whole(
    made: Fixture, tmp_path: Path, contents: Fixture
) -> None:
    request = read_request(made("shards"), "4", "shards")
    run = prepare(request, tmp_path / "new")
    members = members_of(request.config)
    assert len(members) == 2
    for shard, clients in members.items():
        copy = contents(run.path / "shards" / f"shard-{shard:04d}")
        source = contents(request.source.path / "shards" / f"shard-{shard:04d}")
        assert copy == ({} if 4 in clients else source)


def test_asking_again_finds_what_was_prepared(made: Fixture, tmp_path: Path) -> None:
    request = read_request(made("ledger"), "3", "rewind")
    first = prepare(request, tmp_path / "new")
    (first.path / "mark").touch()
    assert prepare(request, tmp_path / "new").path == first.path
    assert (first.path / "mark").exists()
    with pytest.raises(ConfigError, match="holds another run"):
        prepare(read_request(made("ledger"), "0", "rewind"), tmp_path / "new")


def test_what_a_killed_process_left_is_cleared(made: Fixture, tmp_path: Path) -> None:
    left = tmp_path / ".new.preparing"
    left.mkdir()
    (left / "manifest.json").write_text("{")
    prepare(read_request(made("ledger"), "3", "retrain"), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
