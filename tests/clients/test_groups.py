from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.groups import (
    EVERYONE,
    cluster_of,
    evaluation_sums,
    group_sums,
    measured_groups,
    row_weights,
    trained_groups,
)
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import ConfigError

Fixture = Callable[..., Any]


@pytest.fixture
def work(micro: Fixture) -> Callable[..., Any]:
    return lambda *overrides: open_workspace(whole_json(micro(*overrides)))


def test_groups_of_each_kind(work: Fixture) -> None:
    found = work("fairness.groups=data")
    assert trained_groups(found, 0) == [row.group for row in found.clients[0].train]
    found = work("fairness.groups=label")
    assert trained_groups(found, 1) == [row.target for row in found.clients[1].train]
    found = work("fairness.groups=client")
    assert set(trained_groups(found, 2)) == {"2"}
    found = work()
    assert set(trained_groups(found, 2)) == {EVERYONE}
    assert measured_groups(found, 2, "test") is None


def test_random_groups_are_the_seeds_and_are_measured_on_the_datas_own(work: Fixture) -> None:
    found = work("fairness.groups=random")
    names = [name for client in range(4) for name in trained_groups(found, client)]
    assert names == [name for client in range(4) for name in trained_groups(found, client)]
    assert len(set(names)) == 4
    assert measured_groups(found, 0, "test") == [row.group for row in found.clients[0].test]


def test_sums_by_hand() -> None:
    found = group_sums(
        ["a", "b", "a"], np.array([3.0, 1.0, 2.0]), np.array([2, 1, 1]), np.array([1, 0, -1])
    )
    assert found == {
        "a": {"loss_sum": 3.5, "correct": 1, "total": 2},
        "b": {"loss_sum": 1.0, "correct": 0, "total": 1},
    }


def test_weights_follow_groups_with_a_mean_of_1_and_a_group_without_one_weighs_1() -> None:
    assert row_weights(["a", "b"], {}) is None
    weights = {"a": 2.0, "b": 0.5}
    np.testing.assert_allclose(row_weights(["a", "b", "c", "b"], weights), [2.0, 0.5, 1.0, 0.5])
    np.testing.assert_allclose(row_weights(["a", "b"], weights), [1.6, 0.4])
    np.testing.assert_array_equal(row_weights(["a", "a"], weights), [1.0, 1.0])
    np.testing.assert_array_equal(row_weights(["a", "a"], {"a": 0.0}), [1.0, 1.0])


def test_evaluation_sums_leave_rows_without_a_label_out_of_the_accuracy(work: Fixture) -> None:
    rows = work().encoded(0, "train")[:3]
    found = evaluation_sums(
        rows, np.array([1.0, 2.0, 3.0]), np.array([1, 1, 2]), np.array([1, 0, -1])
    )
    characters = sum(row.characters for row in rows)
    assert found == {
        "correct": 1,
        "total": 2,
        "loss_sum": 6.0,
        "label_tokens": 4,
        "characters": characters,
    }


def test_a_cluster_is_the_group_that_most_rows_are_in(work: Fixture) -> None:
    found = work()
    own = [row.group for row in found.clients[0].train]
    assert cluster_of(found, 0) == min(set(own), key=lambda name: (-own.count(name), name))


@pytest.mark.assets
def test_a_task_without_groups_has_no_clusters(micro: Fixture, work: Fixture) -> None:
    overrides = ("task=r8_topics", "task.train_rows=40", "task.validation_rows=-1", "task.test_rows=20",
                 "partition=iid", "partition.num_clients=2")  # fmt: skip
    with pytest.raises(ConfigError, match=r"method\.cluster_length > 0 and task=r8_topics"):
        cluster_of(work(*overrides), 0)


def test_free_text_is_no_group(work: Fixture, tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    lines = [f"question {n},the secret answer {n}" for n in range(40)]
    file.write_text("\n".join(["prompt,response", *lines]))
    found = work("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
                 "task.loss=vocabulary", "partition=iid", "partition.num_clients=2",
                 f"runtime.data_path={file}", "fairness.groups=label")  # fmt: skip
    with pytest.raises(ConfigError, match="expected rows with labels, got free text"):
        trained_groups(found, 0)
