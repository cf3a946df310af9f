import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.runs.breakdown import (
    ClientRow,
    byte_rows,
    client_rows,
    cumulative_bytes,
    group_rows,
    method_bytes,
    phase_seconds,
    spread,
)
from fedllm_flwr.runs.results import wilson_interval
from fedllm_flwr.runs.snapshot import Snapshot


def test_a_clients_work_is_summed_and_its_quality_is_that_of_the_reported_round(make_run) -> None:
    rows = client_rows(Snapshot.read(make_run()))
    assert [row.partition_id for row in rows] == list(range(8))
    assert rows[1] == ClientRow(
        partition_id=1,
        name="publisher <1>",
        rank=8,
        rounds=4,
        num_examples=64,
        steps=32,
        tokens=16_384,
        cpu_seconds=10.0,
        train_loss=0.375,
        test_rows=16,
        accuracy=1.0,
        interval=wilson_interval(16, 16),
        loss=1.0625,
    )
    assert rows[0].accuracy == 0.875


def test_clients_that_only_trained_or_only_were_evaluated_are_there_and_pooled_rows_are_none(
    make_run,
) -> None:
    run = make_run(rounds=None, finished=False)
    run.append({"kind": "client", "round": 1, "partition_id": 5, "loss": 1.0})
    for partition_id, correct in ((2, 3), (-1, 40)):
        run.append({"kind": "evaluation", "round": 1, "partition_id": partition_id, "split": "test",
                    "correct": correct, "total": 4})  # fmt: skip
    run.append(
        {
            "kind": "evaluation",
            "round": 1,
            "partition_id": 7,
            "split": "validation",
            "correct": 1,
            "total": 4,
        }
    )
    run.append({"kind": "round", "round": 1, "rounds": 1, "accuracy": 0.75})
    rows = client_rows(Snapshot.read(run))
    assert [(r.partition_id, r.rounds, r.accuracy, r.loss) for r in rows] == [
        (2, 0, 0.75, None),
        (5, 1, None, None),
    ]


def test_a_clients_label_is_short_and_names_its_id() -> None:
    labels = [ClientRow(partition_id=3, name=name).label for name in ("", "x" * 24, "x" * 25)]
    assert labels == ["client 3", "x" * 24 + " (3)", "x" * 23 + "… (3)"]


def of(values: list[float]) -> list[ClientRow]:
    return [ClientRow(partition_id=i, accuracy=v, loss=1 - v) for i, v in enumerate(values)]


def test_spread_by_hand() -> None:
    accuracy = spread(of([0.5, 1.0, 0.75]), "accuracy")
    assert accuracy is not None
    assert (accuracy.mean, accuracy.worst, accuracy.worst_client, accuracy.best) == (
        0.75,
        0.5,
        0,
        1.0,
    )
    assert (accuracy.worst_decile, accuracy.clients) == (0.5, 3)
    assert accuracy.deviation == pytest.approx((0.125 / 3) ** 0.5)
    loss = spread(of([0.5, 1.0, 0.75]), "loss")
    assert loss is not None
    assert (loss.worst, loss.worst_client, loss.best, loss.worst_decile) == (0.5, 0, 0.0, 0.5)
    eleven = spread(of([i / 10 for i in range(11)]), "accuracy")
    assert eleven is not None
    assert eleven.worst_decile == pytest.approx(0.05)  # two of eleven
    assert spread([ClientRow(partition_id=0)], "accuracy") is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_spread_is_ordered(values: list[float]) -> None:
    found = spread(of(values), "accuracy")
    assert found is not None
    assert found.worst == min(values)
    assert found.best == max(values)
    assert found.worst <= found.worst_decile <= found.mean + 1e-12 <= found.best + 2e-12
    assert values[found.worst_client] == found.worst


def test_groups(make_run) -> None:
    run = make_run(rounds=None, finished=False)
    for partition_id, group, correct in ((0, "en", 4), (0, "fr", 1), (1, "en", 2)):
        run.append({"kind": "group", "round": 1, "partition_id": partition_id, "split": "test", "group": group,
                    "correct": correct, "total": 4, "loss_sum": 2.0})  # fmt: skip
    run.append({"kind": "round", "round": 1, "accuracy": 7 / 12})
    rows = group_rows(Snapshot.read(run))
    assert [(g.group, g.test_rows, g.accuracy, g.loss) for g in rows] == [
        ("en", 8, 0.75, 0.5),
        ("fr", 4, 0.25, 0.5),
    ]
    assert group_rows(Snapshot.read(make_run("without"))) == []


def test_the_byte_ledger(make_run) -> None:
    snapshot = Snapshot.read(make_run())
    ledger = {
        (row.direction, row.message): (row.bytes, row.messages) for row in byte_rows(snapshot)
    }
    assert ledger == {
        (direction, message): figures
        for direction in ("uplink", "downlink")
        for message, figures in (
            ("query", (1_600, 8)),
            ("train", (32_000_000, 32)),
            ("evaluate", (6_400, 32)),
        )
    }
    assert cumulative_bytes(snapshot, "uplink") == [
        1_600,
        8_003_200,
        16_004_800,
        24_006_400,
        32_008_000,
    ]


def test_without_a_ledger_the_rounds_tell_the_bytes(make_run) -> None:
    run = make_run("bare", rounds=None, finished=False)
    assert cumulative_bytes(Snapshot.read(run), "uplink") == []
    for number in (0, 1, 2):
        run.append({"kind": "round", "round": number, "uplink_bytes": 500 * min(number, 1)})
    assert cumulative_bytes(Snapshot.read(run), "uplink") == [0, 500, 1000]
    assert cumulative_bytes(Snapshot.read(run), "downlink") == [0, 0, 0]


def test_what_the_method_sent_is_the_summarys_figure_else_the_rounds_own(make_run) -> None:
    assert (
        method_bytes(Snapshot.read(make_run(rounds=2, finished=False)), "uplink") == 2 * 8_001_600
    )
    run = make_run("finished")
    run.write_summary({"uplink_bytes": 5})
    assert method_bytes(Snapshot.read(run), "uplink") == 5
    assert method_bytes(Snapshot.read(make_run("none", rounds=None, finished=False)), "uplink") == 0


def test_phases_add_up_to_the_wall_time(make_run) -> None:
    run = make_run()
    phases = phase_seconds(Snapshot.read(run))
    assert phases[0] == {"train": 0.0, "evaluate": 3.0, "aggregate": 0.0, "other": 1.0}
    assert phases[1] == {"train": 40.0, "evaluate": 3.0, "aggregate": 0.5, "other": 1.5}
    assert [sum(entry.values()) for entry in phases] == [r["seconds"] for r in run.records("round")]
