"""What private training draws: rows, noise and dropout masks. Gradients are read off SGD steps with rate 1."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.local import ClientJob, train
from fedllm_flwr.training.private import Releases, plan_private
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy

MakeJob = Callable[..., ClientJob]
MakeRow = Callable[..., Encoded]
Distance = Callable[[np.ndarray, np.ndarray], float]
TOGETHER = 10_000
OPEN = SamplePrivacy(clip_norm=math.inf, noise_multiplier=0.0)
STEP = LocalSettings(
    batch_size=100,
    local_steps=1,
    optimizer="sgd",
    learning_rate=1.0,
    cohort_tokens=TOGETHER,
    sample_privacy=OPEN,
)
"""One step over all rows."""


def seeded(job: ClientJob, seed: int = 0) -> ClientJob:
    return replace(job, random=np.random.default_rng(seed))


def move(backbone: Backbone, job: ClientJob, settings: LocalSettings, **call: object) -> np.ndarray:
    [result] = train(backbone, [job], settings, **call)
    assert result.error == ""
    return job.adapter - result.adapter


def test_the_noise_is_normal_and_of_the_size_that_was_asked_for(
    backbone: Backbone, make_job: MakeJob
) -> None:
    job = make_job(5, num_rows=5)
    quiet = replace(STEP, sample_privacy=SamplePrivacy(clip_norm=4.0, noise_multiplier=0.0))
    loud = replace(STEP, sample_privacy=SamplePrivacy(clip_norm=4.0, noise_multiplier=2.5))
    silence = move(backbone, job, quiet).astype(np.float64)
    noises = np.stack([move(backbone, seeded(job, seed), loud) - silence for seed in range(4)])
    standard = noises * 5 / (4.0 * 2.5)
    assert standard.std() == pytest.approx(1.0, abs=0.03)
    assert stats.kstest(standard.ravel(), "norm").pvalue > 0.01
    correlations = np.corrcoef(standard)[~np.eye(4, dtype=bool)]
    assert np.abs(correlations).max() < 4 / math.sqrt(standard.shape[1])


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_every_step_has_noise_of_its_own(backbone: Backbone, make_job: MakeJob, steps: int) -> None:
    job = seeded(make_job(5))
    privacy = SamplePrivacy(clip_norm=1e-3, noise_multiplier=1e3)  # dwarfs what the rows give
    walk = move(backbone, job, replace(STEP, local_steps=steps, sample_privacy=privacy))
    assert walk.std() == pytest.approx(math.sqrt(steps) / len(job.rows), rel=0.1)


def test_by_default_the_noise_and_the_rows_are_new_every_time(
    backbone: Backbone, make_job: MakeJob
) -> None:
    job = make_job(6, num_rows=9)
    noisy = SamplePrivacy(clip_norm=1.0, noise_multiplier=1.0)
    some = replace(STEP, batch_size=3, local_steps=6, learning_rate=0.2)
    for settings in (replace(STEP, sample_privacy=noisy), some):
        results = [train(backbone, [job], settings)[0].adapter for _ in range(2)]
        assert not np.array_equal(*results)
        again = [train(backbone, [seeded(job)], settings)[0].adapter for _ in range(2)]
        assert np.array_equal(*again)


def test_a_step_without_rows_is_noise_alone(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(7, num_rows=6)
    privacy = SamplePrivacy(clip_norm=2.0, noise_multiplier=1.5)
    settings = replace(STEP, batch_size=1, sample_privacy=privacy)
    seed = next(
        seed
        for seed in range(100)
        if plan_private(job.rows, settings, np.random.default_rng(seed)).steps == [[]]
    )
    [result] = train(backbone, [seeded(job, seed)], settings)
    assert (result.error, result.steps, result.tokens, result.num_examples) == ("", 1, 0, 6)
    assert math.isnan(result.loss)
    assert math.isnan(result.first_loss)
    assert result.releases == Releases(sampling_rate=1 / 6, steps=1, noise_multiplier=1.5)
    random = np.random.default_rng(seed)
    random.random(6)  # who takes part
    noise = 2.0 * 1.5 * random.standard_normal(len(job.adapter))
    assert result.adapter == pytest.approx(job.adapter - noise, rel=1e-5, abs=1e-6)


def test_every_row_is_drawn_with_the_same_probability_by_itself(make_job: MakeJob) -> None:
    rows = make_job(8, num_rows=40).rows
    settings = replace(STEP, batch_size=4, gradient_accumulation=2, local_steps=4000)
    plan = plan_private(rows, settings, np.random.default_rng(3))
    taken = np.zeros((4000, 40), dtype=int)
    for step, passes in enumerate(plan.steps):
        for members in passes:
            taken[step, members] += 1
    assert taken.max() == 1
    assert (plan.expected_rows, plan.releases.sampling_rate) == (8, 0.2)
    # four standard deviations
    assert taken.mean(axis=0) == pytest.approx(np.full(40, 0.2), abs=4 * math.sqrt(0.16 / 4000))
    assert stats.binomtest(int(taken.sum()), taken.size, 0.2).pvalue > 0.01
    assert taken.sum(axis=1).var() == pytest.approx(40 * 0.16, rel=0.1)
    pairs = np.corrcoef(taken.T)[~np.eye(40, dtype=bool)]
    assert np.abs(pairs).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs", "steps", "rate", "count"),
    [(10, 3, 2, 0, 0.3, 8), (10, 5, 1, 0, 0.5, 2), (10, 20, 3, 0, 1.0, 3), (10, 3, 1, 7, 0.3, 7)],
)
def test_rate_and_steps_by_hand(
    make_job: MakeJob,
    num_rows: int,
    batch_size: int,
    epochs: int,
    steps: int,
    rate: float,
    count: int,
) -> None:
    settings = replace(STEP, batch_size=batch_size, local_epochs=epochs, local_steps=steps)
    rows = make_job(0, num_rows=num_rows).rows
    plan = plan_private(rows, settings, np.random.default_rng(0))
    assert plan.releases == Releases(sampling_rate=rate, steps=count, noise_multiplier=0.0)
    assert (len(plan.steps), plan.expected_rows) == (count, min(num_rows, batch_size))


@pytest.mark.parametrize("budget", [0, 1, 60, 150, TOGETHER])
@pytest.mark.parametrize("extra", [-2, 0, 5])
def test_passes_stay_within_the_budget(make_job: MakeJob, budget: int, extra: int) -> None:
    rows = make_job(9, num_rows=30, lengths=(3, 20)).rows
    settings = replace(STEP, batch_size=12, local_steps=20, cohort_tokens=budget)
    plan = plan_private(rows, settings, np.random.default_rng(0), extra=extra)
    passes = [members for step in plan.steps for members in step]
    for members in passes:
        longest = max(len(rows[index].input_ids) for index in members)
        assert len(members) == 1 or len(members) * (longest + extra) <= budget
    assert plan.slots == max(len(members) for members in passes)
    apart = plan_private(rows, settings, np.random.default_rng(0), extra=extra, alone=True)
    assert apart.slots == 1
    for step, single in zip(plan.steps, apart.steps, strict=True):
        assert sorted(np.concatenate(step)) == sorted(np.concatenate(single))
    assert all(
        len(rows[a[-1]].input_ids) <= len(rows[b[0]].input_ids)
        for step in plan.steps
        for a, b in pairwise(step)
    )


def test_dropout_acts_on_each_row_with_a_mask_of_its_own(
    backbone: Backbone, make_job: MakeJob, make_row: MakeRow, spec: LoraSpec, distance: Distance
) -> None:
    job = make_job(10, own_spec=replace(spec, dropout=0.5), num_rows=1)
    twice = replace(job, rows=[job.rows[0]] * 2)
    one = move(backbone, seeded(job), STEP)
    assert np.array_equal(one, move(backbone, seeded(job), STEP))
    assert distance(one, move(backbone, seeded(job, 1), STEP)) > 0.1
    assert distance(one, move(backbone, seeded(twice), STEP)) > 0.1
    assert distance(one, move(backbone, replace(job, spec=spec), STEP)) > 0.1


def test_a_plan_needs_private_settings(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match="expected settings with sample_privacy, got none"):
        plan_private(make_job(0).rows, LocalSettings(), np.random.default_rng(0))
