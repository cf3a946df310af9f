from pathlib import Path

from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.snapshot import Snapshot, flatten


def test_a_finished_run(make_run) -> None:
    snapshot = Snapshot.read(make_run())
    assert (snapshot.experiment, snapshot.method, snapshot.status) == (
        "r8_demo",
        "fedlora",
        "finished",
    )
    assert [r["round"] for r in snapshot.rounds] == [0, 1, 2, 3, 4]
    assert (snapshot.completed_rounds, snapshot.planned_rounds, snapshot.reported_round) == (
        4,
        4,
        4,
    )
    assert len(snapshot.of("client")) == 4 * 8


def test_how_far_an_unfinished_run_came(make_run) -> None:
    cases = {
        None: "unfinished (0 of 4 rounds)",
        0: "unfinished (0 of 4 rounds)",
        2: "unfinished (2 of 4 rounds)",
    }
    for rounds, status in cases.items():
        snapshot = Snapshot.read(make_run(f"run{rounds}", rounds=rounds, finished=False))
        assert snapshot.status == status
        assert snapshot.reported_round == (rounds or 0)


def test_a_bare_manifest_is_enough(tmp_path: Path) -> None:
    snapshot = Snapshot.read(RunDirectory.create(tmp_path / "bare", {"config": None}))
    assert (snapshot.experiment, snapshot.method) == ("bare", "federated")
    assert (snapshot.status, snapshot.planned_rounds, snapshot.config) == (
        "unfinished (0 rounds)",
        0,
        {},
    )


def test_a_repeated_round_counts_once_with_its_last_record(make_run) -> None:
    run = make_run(rounds=2, finished=False)
    run.append({"kind": "round", "round": 1, "rounds": 4, "accuracy": 0.125})
    assert [r.get("accuracy") for r in Snapshot.read(run).rounds] == [0.375, 0.125, 0.75]


def test_the_reported_round_is_the_selected_one_else_the_last_evaluated(make_run) -> None:
    run = make_run(rounds=3, finished=False)
    run.append({"kind": "round", "round": 4, "rounds": 4, "train_loss": 0.3})
    assert Snapshot.read(run).reported_round == 3
    run.write_summary({"selected_round": 2})
    assert Snapshot.read(run).reported_round == 2


def test_null_is_absent(make_run) -> None:
    run = make_run(rounds=None, finished=False)
    run.append({"kind": "round", "round": 1, "loss": float("nan"), "accuracy": 0.5})
    assert Snapshot.read(run).rounds == [{"kind": "round", "round": 1, "accuracy": 0.5}]


def test_flatten() -> None:
    tree = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": {}}
    assert flatten(tree) == {"a": 1, "b.c": "[1, 2]", "b.d.e": None}
