"""Gradients are read off SGD steps with rate 1: start minus end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import stats

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError
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
    for settings in (replace(STEP, sample_privacy=noisy), replace(SGD, sample_privacy=OPEN)):
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


def test_a_plan_needs_private_settings(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match="expected settings with sample_privacy, got none"):
        plan_private(make_job(0).rows, LocalSettings(), np.random.default_rng(0))
