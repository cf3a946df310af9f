import os
from itertools import pairwise

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedllm_flwr.runs.tensorboard import write_tensorboard


def read(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_the_curves_come_back_by_round(make_run) -> None:
    run = make_run()
    folder = write_tensorboard(run)
    assert folder == run.path / "tensorboard"
    events = read(folder)
    assert {(e.step, e.value) for e in events.Scalars("accuracy/test")} == {
        (r["round"], r["accuracy"]) for r in run.records("round")
    }
    assert [(e.step, e.value) for e in events.Scalars("loss/training")] == [
        (1, 1.5),
        (2, 0.75),
        (3, 0.5),
        (4, 0.375),
    ]
    assert [e.value for e in events.Scalars("bytes/uplink")] == [
        1_600,
        8_003_200,
        16_004_800,
        24_006_400,
        32_008_000,
    ]
    assert [e.value for e in events.Scalars("seconds/train")] == [40.0] * 4
    assert set(events.Tags()["scalars"]) == {
        "accuracy/test", "accuracy/validation", "accuracy/worst_client", "loss/test", "loss/training", "bytes/uplink",
        "bytes/downlink", "seconds/round", "seconds/train", "seconds/evaluate", "seconds/aggregate",
        "memory/server_bytes",
    }  # fmt: skip
    times = [e.wall_time for e in events.Scalars("accuracy/test")]
    assert [b - a for a, b in pairwise(times)] == pytest.approx([45.0] * 4)


def test_writing_again_after_a_resume_leaves_the_new_curves_only(make_run) -> None:
    run = make_run(rounds=3, finished=False)
    first = read(write_tensorboard(run)).Scalars("accuracy/test")
    run.truncate_after(1)
    run.append({"kind": "round", "round": 2, "accuracy": 0.625, "seconds": 45.0})
    folder = write_tensorboard(run)
    second = read(folder).Scalars("accuracy/test")
    assert [(e.step, e.value) for e in second] == [(0, 0.375), (1, 0.5), (2, 0.625)]
    assert second[:2] == first[:2]
    write_tensorboard(run)
    assert read(folder).Scalars("accuracy/test") == second
    # An open TensorBoard goes on to files that sort later.
    assert os.listdir(folder) == ["events.out.tfevents.000002"]


def test_a_run_without_rounds_has_no_curves(make_run) -> None:
    assert read(write_tensorboard(make_run(rounds=None, finished=False))).Tags()["scalars"] == []
