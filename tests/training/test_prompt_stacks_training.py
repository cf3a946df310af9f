"""Training with soft prompts; gradients are read off a single SGD step with rate 1: start minus end."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.training.evaluate import evaluate
from fedllm_flwr.training.local import ClientJob, plan_cohorts, train
from fedllm_flwr.training.prompt_stacks import check_rows
from fedllm_flwr.training.settings import LocalSettings

MakeJob = Callable[..., ClientJob]
Distance = Callable[[np.ndarray, np.ndarray], float]
Gradient = Callable[..., tuple[float, np.ndarray]]
Fixed = tuple[int, ...]
HEAD = (7, 3, 11)
TOGETHER = 10_000
ONE_STEP = LocalSettings(
    batch_size=8, local_steps=1, optimizer="sgd", learning_rate=1.0, cohort_tokens=0
)
SGD = LocalSettings(batch_size=2, local_epochs=2, optimizer="sgd", learning_rate=0.2, momentum=0.9)
PLACEMENTS = pytest.mark.parametrize("placement", ["before", "after"])


@PLACEMENTS
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
def test_a_step_follows_the_gradient_of_the_mean_loss(
    served: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    prompt_gradient: Gradient,
    distance: Distance,
    placement: str,
    labels: bool,
    cohort_tokens: int,
) -> None:
    jobs = [make_prompt_job(k, placement=placement, labels=labels) for k in range(3)]
    head = HEAD if labels else None
    settings = replace(ONE_STEP, cohort_tokens=cohort_tokens)
    results = train(served, jobs, settings, head_token_ids=head, fixed_ids=fixed_ids)
    for job, result in zip(jobs, results, strict=True):
        loss, gradient = prompt_gradient(job, job.rows, head)
        assert result.error == ""
        assert result.first_loss == pytest.approx(loss, rel=1e-5)
        # 1e-4: float32 sums in another order
        assert distance(job.adapter - result.adapter, gradient) < 1e-4
        assert result.tokens == sum(len(row.input_ids) for row in job.rows)


@PLACEMENTS
def test_together_as_one_by_one_and_with_a_delta_of_width_0(
    backbone: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    distance: Distance,
    placement: str,
    delta: object,
) -> None:
    sizes = ((4, (2, 9)), (7, (2, 9)), (1, (5, 5)), (5, (20, 30)))
    jobs = [
        make_prompt_job(k, placement=placement, num_rows=n, lengths=lengths)
        for k, (n, lengths) in enumerate(sizes)
    ]
    apart = train(backbone, jobs, replace(SGD, cohort_tokens=0), fixed_ids=fixed_ids)
    joint = train(
        backbone, jobs, replace(SGD, cohort_tokens=TOGETHER), fixed_ids=fixed_ids, delta=delta
    )
    for job, one, many in zip(jobs, apart, joint, strict=True):
        assert (one.error, many.error) == ("", "")
        assert distance(many.adapter - job.adapter, one.adapter - job.adapter) < 1e-4
        assert many.loss == pytest.approx(one.loss, rel=1e-5)
        assert (many.steps, many.tokens) == (one.steps, one.tokens)


@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("trained", ["personal", "shared"])
def test_what_is_not_trained_stays_bit_equal(
    served: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    trained: str,
    optimizer: str,
    cohort_tokens: int,
) -> None:
    jobs = [make_prompt_job(k, trained=(trained,)) for k in range(2)]
    settings = LocalSettings(
        batch_size=2,
        local_epochs=2,
        optimizer=optimizer,
        momentum=0.9,
        weight_decay=0.1,
        proximal_mu=0.1,
        clip_norm=1.0,
        cohort_tokens=cohort_tokens,
    )
    for job, result in zip(jobs, train(served, jobs, settings, fixed_ids=fixed_ids), strict=True):
        before, after = job.spec.split(job.adapter), job.spec.split(result.adapter)
        for name in before:
            assert np.array_equal(before[name], after[name]) == (name != trained)


def test_a_segment_s_gradient_is_its_part_of_the_whole_prompt_s(
    backbone: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    prompt_gradient: Gradient,
    distance: Distance,
) -> None:
    job = make_prompt_job(3, trained=("shared",))
    [result] = train(backbone, [job], ONE_STEP, fixed_ids=fixed_ids)
    _, gradient = prompt_gradient(job, job.rows)
    wanted = job.spec.split(gradient)["shared"]
    assert distance(job.spec.split(job.adapter - result.adapter)["shared"], wanted) < 1e-4


def test_the_backbone_and_the_jobs_are_left_alone(
    served: Backbone, fixed_ids: Fixed, make_prompt_job: MakeJob
) -> None:
    weights = {name: value.clone() for name, value in served.model.state_dict().items()}
    jobs = [make_prompt_job(k) for k in range(2)]
    before = [job.adapter.copy() for job in jobs]
    settings = replace(SGD, cohort_tokens=TOGETHER)
    first, second = (train(served, jobs, settings, fixed_ids=fixed_ids) for _ in range(2))
    assert all(np.array_equal(a.adapter, b.adapter) for a, b in zip(first, second, strict=True))
    after = served.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in served.model.parameters())
    assert all(np.array_equal(job.adapter, old) for job, old in zip(jobs, before, strict=True))


def test_rows_that_do_not_suit_the_prompt_are_their_client_s_error(
    backbone: Backbone, fixed_ids: Fixed, make_prompt_job: MakeJob
) -> None:
    jobs = [make_prompt_job(k, num_rows=2) for k in range(4)]

    def spoil(job: ClientJob, **changes: np.ndarray) -> ClientJob:
        return replace(job, rows=[job.rows[0], replace(job.rows[1], **changes)])

    other, early = jobs[1].rows[1], jobs[2].rows[1]
    jobs[1] = spoil(jobs[1], input_ids=np.roll(other.input_ids, 1))
    jobs[2] = spoil(jobs[2], predict_from=early.predict_from - 1)
    jobs[3] = replace(jobs[3], adapter=jobs[3].adapter[1:])
    settings = replace(SGD, cohort_tokens=TOGETHER)
    found = [result.error for result in train(backbone, jobs, settings, fixed_ids=fixed_ids)]
    assert found[0] == ""
    assert "client 1: ShapeError: row row501: expected it to begin with the 4 tokens" in found[1]
    assert "predicted behind the prompt, at position 4 or later, got 3" in found[2]
    assert "client 3: ShapeError: flat prompt: expected 5 x 64 values, got shape" in found[3]
    check_rows(replace(jobs[1].spec, placement="before"), jobs[1].rows, fixed_ids)
    check_rows(LoraSpec(rank=1, alpha=1.0), jobs[1].rows, fixed_ids)


def test_a_prompt_before_the_row_is_peft_s_prompt_tuning(
    backbone: Backbone, make_prompt_job: MakeJob, distance: Distance
) -> None:
    jobs = [make_prompt_job(k, placement="before") for k in range(2)]
    theirs = [replace(job, spec=PeftPromptSpec("prompt_tuning", job.spec.length)) for job in jobs]
    settings = replace(SGD, cohort_tokens=TOGETHER)
    assert sorted(plan_cohorts(dict(enumerate(theirs)), settings)) == [[0], [1]]
    for job, own, other in zip(
        jobs, train(backbone, jobs, settings), train(backbone, theirs, settings), strict=True
    ):
        assert (own.error, other.error) == ("", "")
        assert distance(own.adapter - job.adapter, other.adapter - job.adapter) < 1e-4
        assert own.loss == pytest.approx(other.loss, rel=1e-5)
        measured = [
            evaluate(backbone, job.rows, adapter=own.adapter, spec=spec)
            for spec in (job.spec, theirs[0].spec)
        ]
        assert measured[0].loss_sum == pytest.approx(measured[1].loss_sum, rel=1e-5)
