"""Signs that trained values keep to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.models.adapters import AdapterLayout
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.local import ClientJob, train
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy
from fedllm_flwr.unlearning.signs import sign_vector

HEAD = (7, 3, 11)
ONE_STEP = LocalSettings(
    batch_size=8, local_steps=1, optimizer="sgd", learning_rate=0.5, cohort_tokens=0
)
MakeJob = Callable[..., ClientJob]


def ran(backbone: Backbone, job: ClientJob, settings: LocalSettings) -> np.ndarray:
    [result] = train(backbone, [job], settings)
    assert result.error == ""
    return result.adapter


@pytest.mark.parametrize("side", ["both", "b"])
def test_one_step_is_the_free_step_projected(
    side: Any, backbone: Backbone, make_job: MakeJob, layout: AdapterLayout
) -> None:
    job, settings = make_job(1), replace(ONE_STEP, side=side)
    signs = sign_vector(3, layout.size)
    free = ran(backbone, job, settings) - job.adapter
    found = ran(backbone, replace(job, signs=signs), settings)
    kept = free * signs > 0
    np.testing.assert_array_equal(found[kept], (ran(backbone, job, settings))[kept])
    np.testing.assert_array_equal(found[~kept], job.adapter[~kept])
    moved = found - job.adapter
    np.testing.assert_array_equal(np.where(moved * signs > 0, moved, 0), moved)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_after_every_step_values_are_on_their_side(
    optimizer: Any, backbone: Backbone, make_job: MakeJob, layout: AdapterLayout
) -> None:
    settings = replace(
        ONE_STEP, optimizer=optimizer, learning_rate=0.01, local_steps=4, weight_decay=0.1
    )
    signs = sign_vector(4, layout.size)
    job = make_job(2)
    moved = ran(backbone, replace(job, signs=signs), settings) - job.adapter
    assert (moved * signs >= 0).all()
    assert (moved != 0).any()
    assert (((ran(backbone, job, settings) - job.adapter) * signs) < 0).any(), "free values do not"


def test_signs_and_rows_privacy_exclude_each_other(
    backbone: Backbone, make_job: MakeJob, layout: AdapterLayout
) -> None:
    private = replace(ONE_STEP, sample_privacy=SamplePrivacy(clip_norm=1.0, noise_multiplier=0.0))
    [result] = train(backbone, [replace(make_job(1), signs=sign_vector(1, layout.size))], private)
    assert "sample_privacy: expected no signs" in result.error
