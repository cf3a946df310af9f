from dataclasses import replace

import numpy as np
import pytest

from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.jobs import ClientJob, failed, labelled, problem_of


def row(name: str, targets: int) -> Encoded:
    return Encoded(
        row_id=name,
        input_ids=np.arange(6, dtype=np.int32),
        predict_from=np.arange(targets, dtype=np.int32),
        targets=np.arange(targets, dtype=np.int32),
        label=0,
        characters=1,
    )


JOB = ClientJob(7, [row("a", 1), row("b", 0), row("c", 2)], np.arange(4, dtype=np.float32),
                LoraSpec(rank=1, alpha=1.0, target_modules=("q_proj",)), seed=3)  # fmt: skip


def test_rows_without_label_tokens_are_left_out_with_their_weights() -> None:
    kept = labelled(replace(JOB, row_weights=np.array([1.0, 2.0, 3.0])))
    assert [r.row_id for r in kept.rows] == ["a", "c"]
    assert kept.row_weights is not None
    assert kept.row_weights.tolist() == [1.0, 3.0]
    assert labelled(JOB).row_weights is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"row_weights": np.zeros(3)}, ""),
        ({"rows": [row("b", 0)]}, "expected rows with label tokens, got none in 1 rows"),
        ({"row_weights": np.ones(2)}, "row weights: expected one for each of 3 rows, got shape (2,)"),
        ({"row_weights": np.array([1, -1, 1])}, "row weights: expected finite numbers >= 0, got -1"),
        ({"row_weights": np.array([1, np.nan, 1])}, "row weights: expected finite numbers >= 0, got nan"),
    ],
)  # fmt: skip
def test_what_stops_a_client_is_said(changes: dict, reason: str) -> None:
    assert problem_of(replace(JOB, **changes)) == reason


def test_a_client_that_failed_gives_its_start_values_back_and_one_line() -> None:
    result = failed(JOB, "it broke\nsecret row")
    assert result.error == "client 7: it broke"
    assert result.num_examples == 0
    assert np.array_equal(result.adapter, JOB.adapter)
    assert result.adapter is not JOB.adapter
