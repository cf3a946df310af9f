"""Gradients are read off SGD steps with rate 1: start minus end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fedllm_flwr.averaging import Delta
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.flat import FlatFactors
from fedllm_flwr.training.local import ClientJob, plan_cohorts, train
from fedllm_flwr.training.private import Releases, add_clipped, plan_private
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy

MakeJob = Callable[..., ClientJob]
MakeRow = Callable[..., Encoded]
Distance = Callable[[np.ndarray, np.ndarray], float]
Fixed = tuple[int, ...]
HEAD = (7, 3, 11)
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
SGD = replace(STEP, batch_size=3, local_steps=0, local_epochs=2, learning_rate=0.2, momentum=0.9)
PLACEMENTS = pytest.mark.parametrize("placement", ["before", "after"])


def seeded(job: ClientJob, seed: int = 0) -> ClientJob:
    return replace(job, random=np.random.default_rng(seed))


def move(backbone: Backbone, job: ClientJob, settings: LocalSettings, **call: object) -> np.ndarray:
    [result] = train(backbone, [job], settings, **call)
    assert result.error == ""
    return job.adapter - result.adapter


def equal_rows(job: ClientJob) -> np.ndarray:
    """Weights under which the plain mean over label tokens is the mean over rows of their own means."""
    counts = np.array([len(row.targets) for row in job.rows])
    return counts.sum() / (len(counts) * counts)


def clipped(gradients: Sequence[np.ndarray], bound: float) -> np.ndarray:
    return sum(g * min(1.0, bound / float(np.linalg.norm(g))) for g in gradients)


@pytest.mark.parametrize("cohort_tokens", [0, 40, TOGETHER])
@pytest.mark.parametrize("labels", [False, True])
def test_each_row_s_gradient_is_that_of_a_pass_of_its_own(
    backbone: Backbone,
    delta: Delta | None,
    make_job: MakeJob,
    full_gradient: Callable[..., np.ndarray],
    distance: Distance,
    labels: bool,
    cohort_tokens: int,
) -> None:
    job = make_job(0, lengths=(3, 25), labels=labels)
    head = HEAD if labels else None
    alone = [full_gradient(job, [row], head) for row in job.rows]
    norms = [float(np.linalg.norm(gradient)) for gradient in alone]
    bound = float(np.median(norms))  # clips half of them
    privacy = SamplePrivacy(clip_norm=bound, noise_multiplier=0.0)
    settings = replace(STEP, cohort_tokens=cohort_tokens, sample_privacy=privacy)
    found = move(backbone, job, settings, head_token_ids=head, delta=delta)
    # 1e-4: float32 sums in another order
    assert distance(found, clipped(alone, bound) / len(alone)) < 1e-4
    assert distance(found, sum(alone) / len(alone)) > 0.1


@pytest.mark.parametrize("side", ["both", "a", "b"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_clip_and_noise_it_is_plain_training_over_all_rows(
    backbone: Backbone,
    make_job: MakeJob,
    distance: Distance,
    side: str,
    labels: bool,
    optimizer: str,
) -> None:
    job = make_job(1, lengths=(3, 25), labels=labels)
    private = replace(
        STEP,
        batch_size=3,
        gradient_accumulation=4,
        local_steps=4,
        optimizer=optimizer,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=0.01,
        proximal_mu=0.5,
        side=side,
    )
    head = HEAD if labels else None
    plain = replace(private, sample_privacy=None)
    weighted = replace(job, row_weights=equal_rows(job))
    [wanted] = train(backbone, [weighted], plain, head_token_ids=head)
    [found] = train(backbone, [job], private, head_token_ids=head)
    # AdamW turns rounding into steps where a gradient is near 0
    close = 1e-5 if optimizer == "sgd" else 1e-3
    assert distance(found.adapter - job.adapter, wanted.adapter - job.adapter) < close
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.first_loss == pytest.approx(wanted.first_loss, rel=1e-6)
    counts = (wanted.num_examples, wanted.steps, wanted.tokens)
    assert (found.num_examples, found.steps, found.tokens) == counts
    assert wanted.releases is None
    assert found.releases == Releases(sampling_rate=1.0, steps=4, noise_multiplier=0.0)
    parts = FlatFactors(backbone, job.spec, side)
    before, after = (parts.split(adapter) for adapter in (job.adapter, found.adapter))
    assert len(before[1]) > 0 or side == "both"
    assert np.array_equal(after[1], before[1])
    assert not np.array_equal(after[0], before[0])


@pytest.mark.parametrize("make", ["make_job", "make_prompt_job"])
def test_poisson_steps_follow_the_rows_that_were_drawn(
    backbone: Backbone,
    fixed_ids: Fixed,
    distance: Distance,
    make: str,
    request: pytest.FixtureRequest,
) -> None:
    job = request.getfixturevalue(make)(2, num_rows=8)
    settings = replace(SGD, momentum=0.0, batch_size=2)
    plan = plan_private(job.rows, settings, np.random.default_rng(5))
    drawn = [np.concatenate([*passes, []]).astype(int) for passes in plan.steps]
    assert len(drawn) == 8
    assert len({len(rows) for rows in drawn}) > 1
    adapter = job.adapter
    for rows in filter(len, drawn):
        own = replace(job, adapter=adapter, rows=[job.rows[index] for index in rows])
        rate = settings.learning_rate * len(rows) / 2  # divided by the expected rows instead
        plain = replace(STEP, learning_rate=rate, sample_privacy=None)
        own = replace(own, row_weights=equal_rows(own))
        adapter = adapter - move(backbone, own, plain, fixed_ids=fixed_ids)
    found = move(backbone, seeded(job, 5), settings, fixed_ids=fixed_ids)
    assert distance(found, job.adapter - adapter) < 1e-5


@PLACEMENTS
@pytest.mark.parametrize("trained", [(), ("shared",)])
def test_a_soft_prompt_s_rows_are_clipped_one_by_one(
    served: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    prompt_gradient: Callable[..., tuple[float, np.ndarray]],
    distance: Distance,
    placement: str,
    trained: tuple[str, ...],
) -> None:
    job = make_prompt_job(0, placement=placement, lengths=(2, 30), trained=trained)
    pairs = [prompt_gradient(job, [row]) for row in job.rows]
    width = len(job.adapter) // job.spec.length
    moves = np.repeat(job.spec.trained_rows(trained), width)
    alone = [gradient * moves for _, gradient in pairs]
    bound = float(np.median([np.linalg.norm(gradient) for gradient in alone]))
    privacy = SamplePrivacy(clip_norm=bound, noise_multiplier=0.0)
    for cohort_tokens in (0, TOGETHER):
        settings = replace(STEP, sample_privacy=privacy, cohort_tokens=cohort_tokens)
        [result] = train(served, [job], settings, fixed_ids=fixed_ids)
        found = job.adapter - result.adapter
        assert distance(found, clipped(alone, bound) / len(alone)) < 1e-4
        assert np.array_equal(result.adapter[~moves], job.adapter[~moves])
        assert result.loss == pytest.approx(np.mean([loss for loss, _ in pairs]), rel=1e-5)


def test_peft_s_own_prompts_train_row_by_row(backbone: Backbone, make_job: MakeJob) -> None:
    spec = PeftPromptSpec("prompt_tuning", length=3)
    values = np.random.default_rng(0).standard_normal(3 * backbone.hidden_size)
    job = replace(make_job(0, labels=True), spec=spec, adapter=values.astype(np.float32))
    found = move(backbone, job, STEP, head_token_ids=HEAD)
    wanted = move(backbone, job, replace(STEP, sample_privacy=None), head_token_ids=HEAD)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
def test_passes_change_nothing_but_rounding(
    backbone: Backbone, make_job: MakeJob, distance: Distance, cohort_tokens: int
) -> None:
    job = make_job(3, num_rows=9, lengths=(3, 20))
    privacy = SamplePrivacy(clip_norm=1.0, noise_multiplier=0.5)
    settings = replace(SGD, sample_privacy=privacy, cohort_tokens=40)
    other = replace(settings, cohort_tokens=cohort_tokens)
    found, wanted = (move(backbone, seeded(job), each) for each in (other, settings))
    assert distance(found, wanted) < 1e-5


@examples(max_examples=25, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(2, 12),
    st.floats(1e-3, 30.0),
    st.sampled_from(["both", "b"]),
)
def test_one_row_moves_the_sum_by_twice_the_clip_norm_at_most(
    backbone: Backbone,
    make_job: MakeJob,
    make_row: MakeRow,
    changed: int,
    length: int,
    bound: float,
    side: str,
) -> None:
    job = make_job(4, num_rows=4)
    privacy = SamplePrivacy(clip_norm=bound, noise_multiplier=0.0)
    settings = replace(STEP, sample_privacy=privacy, side=side, learning_rate=1.0)
    other = replace(job, rows=[*job.rows[:-1], make_row(changed, length, prompt=2)])
    fewer = replace(job, rows=job.rows[:-1])
    whole, swapped, without = (
        len(each.rows) * move(backbone, each, settings).astype(np.float64)
        for each in (job, other, fewer)
    )
    slack = 1e-4 * bound + 1e-5  # rounding of the adapter that the step is read off
    assert np.linalg.norm(whole - swapped) <= 2 * bound + slack
    assert np.linalg.norm(whole - without) <= bound + slack
    assert np.linalg.norm(whole) <= 4 * bound + slack


@given(st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_a_clipped_gradient_is_as_long_as_allowed_over_all_its_parts(
    scale: float, seed: int, bound: float
) -> None:
    draws = np.random.default_rng(seed)
    parts = [torch.from_numpy(scale * draws.standard_normal((n, 3))).float() for n in (5, 1)]
    totals = [torch.zeros_like(part) for part in parts]
    norm = add_clipped(totals, parts, bound)
    flat, sums = (torch.cat([p.flatten() for p in each]).double() for each in (parts, totals))
    assert norm == pytest.approx(float(flat.norm()), rel=1e-12)
    assert float(sums.norm()) == pytest.approx(min(norm, bound), rel=1e-6)
    torch.testing.assert_close(sums * norm, flat * float(sums.norm()), rtol=1e-5, atol=1e-30)


def test_a_short_gradient_keeps_its_bits_and_a_broken_one_is_not_added() -> None:
    part = torch.tensor([0.1, 0.2, 0.3])
    total = torch.zeros(3)
    add_clipped([total], [part], math.inf)
    assert torch.equal(total, part)
    assert add_clipped([total], [torch.tensor([math.inf, 0.0, 0.0])], 1.0) == math.inf
    assert math.isnan(add_clipped([total], [torch.tensor([math.nan, 0.0, 0.0])], 1.0))
    assert torch.equal(total, part)


def test_clients_are_cohorts_of_their_own_and_fail_alone(
    backbone: Backbone, make_job: MakeJob
) -> None:
    jobs = [seeded(make_job(client), client) for client in range(3)]
    assert plan_cohorts(dict(enumerate(jobs)), SGD) == [[0], [1], [2]]
    [alone] = train(backbone, [seeded(jobs[2], 2)], SGD)
    jobs[0].adapter[5] = np.nan
    jobs[1] = replace(jobs[1], row_weights=np.ones(len(jobs[1].rows)))
    broken, weighted, good = train(backbone, [seeded(job, job.partition_id) for job in jobs], SGD)
    assert broken.error == "client 0: loss is nan at step 1"
    assert (broken.releases, broken.steps) == (None, 0)
    assert weighted.error.startswith(
        "client 1: ConfigError: sample_privacy: expected no row_weights, which depend on"
    )
    assert np.array_equal(good.adapter, alone.adapter)
    assert (good.error, good.loss) == ("", alone.loss)


def test_an_adapter_that_overflows_is_an_error(backbone: Backbone, make_job: MakeJob) -> None:
    noisy = SamplePrivacy(clip_norm=1.0, noise_multiplier=1e30)
    settings = replace(STEP, learning_rate=1e30, sample_privacy=noisy)
    [result] = train(backbone, [make_job(0)], settings)
    assert result.error == "client 0: adapter is not finite after step 1"
    assert result.releases is None


def test_global_generators_and_backbone_are_left_alone(
    backbone: Backbone, make_job: MakeJob, spec: LoraSpec, delta: Delta | None
) -> None:
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    python_side, torch_side = np.random.get_state(), torch.get_rng_state()
    noisy = SamplePrivacy(clip_norm=1.0, noise_multiplier=1.0)
    jobs = [make_job(0), make_job(1, own_spec=replace(spec, dropout=0.3))]
    starts = [job.adapter.copy() for job in jobs]
    train(backbone, jobs, replace(SGD, sample_privacy=noisy), delta=delta)
    assert torch.equal(torch.get_rng_state(), torch_side)
    assert np.array_equal(np.random.get_state()[1], python_side[1])
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert all(np.array_equal(job.adapter, old) for job, old in zip(jobs, starts, strict=True))
