from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.odd_client import ODD
from clients.workspace import Workspace, open_workspace
from fedllm_flwr.core import resumed_config, whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.forgetting.subjects import (
    adaptation_of,
    check_examinable,
    relearned,
    relearning_job,
)
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.training.examine import examine

Fixture = Callable[..., Any]


@pytest.fixture(scope="module")
def work(odd: Fixture) -> Workspace:
    run, rows = odd()
    config = resumed_config(run, None)
    runtime = replace(config.runtime, data_path=str(rows))
    return open_workspace(whole_json(replace(config, runtime=runtime)))


def losses(work: Workspace, model: Adaptation) -> np.ndarray:
    encoder = work.encoder()
    rows = encoder.encode(work.clients[ODD].train)
    return examine(work.backbone, rows, model, head_token_ids=encoder.head_token_ids).losses


def test_a_runs_model_says_what_the_run_measured(work: Workspace, odd: Fixture) -> None:
    """The evaluation of the last round, client by client, from the exported adapter."""
    run, _ = odd()
    model, encoder = adaptation_of(run, work.config), work.encoder()
    for record in run.records("evaluation")[-3:]:
        rows = encoder.encode(getattr(work.clients[record["partition_id"]], record["split"]))
        found = examine(work.backbone, rows, model, head_token_ids=encoder.head_token_ids)
        assert found.losses.sum() == pytest.approx(record["loss_sum"], rel=1e-3)


def test_relearning_begins_where_the_model_is_and_ascent_goes_up(
    work: Workspace, odd: Fixture
) -> None:
    model, encoder = adaptation_of(odd()[0], work.config), work.encoder()
    rows = encoder.encode(work.clients[ODD].train)
    job = relearning_job(work, model, rows, 3)
    before = losses(work, model)
    fresh = replace(model, adapter=job.adapter, spec=job.spec)
    np.testing.assert_array_equal(losses(work, fresh), before)
    for ascend, sign in ((False, 1), (True, -1)):
        tuned = relearned(work, job, model, 4, encoder, ascend=ascend)
        after = losses(work, replace(model, adapter=tuned.adapter, spec=tuned.spec))
        assert sign * (before.mean() - after.mean()) > 0
        assert tuned.seed != job.seed, "the next steps draw other orders"


def test_what_cannot_be_looked_at_is_named(smoke: Fixture) -> None:
    for overrides, match in (
        (("runtime=deployment", "baselines=none"), "runtime=deployment: the client's rows are on its node"),
        (("method=fedgrass", "strategy=row_mean", "client.clip_norm=0"), "expected fedlora or fedprompt"),
        (("method=fedprompt", "strategy=prompt_mean", "method.personal_length=2"), r"method\.personal_length"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            check_examinable(smoke(*overrides))
