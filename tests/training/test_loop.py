"""Gradients of the loop, read off a single SGD step with rate 1: start minus end."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_flwr.averaging import Delta
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, collate, plan_steps
from fedllm_flwr.training.evaluate import evaluate
from fedllm_flwr.training.local import ClientJob, LocalResult, train
from fedllm_flwr.training.loop import forward_backward
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import make_stack

ONE_STEP = LocalSettings(
    batch_size=8, local_steps=1, optimizer="sgd", learning_rate=1.0, cohort_tokens=0
)
HEAD = (7, 3, 11)
TOGETHER = 10_000
Distance = Callable[[np.ndarray, np.ndarray], float]


def step_of(job: ClientJob, result: LocalResult) -> np.ndarray:
    assert result.error == ""
    return job.adapter - result.adapter


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
def test_gradient_is_that_of_the_full_logits(
    backbone: Backbone,
    delta: Delta | None,
    make_job: Callable[..., ClientJob],
    full_gradient: Callable[..., np.ndarray],
    distance: Distance,
    labels: bool,
    cohort_tokens: int,
) -> None:
    jobs = [make_job(client, labels=labels) for client in range(3)]
    head = HEAD if labels else None
    settings = replace(ONE_STEP, cohort_tokens=cohort_tokens)
    for job, result in zip(
        jobs, train(backbone, jobs, settings, head_token_ids=head, delta=delta), strict=True
    ):
        # 1e-4: float32 sums in another order
        assert distance(step_of(job, result), full_gradient(job, job.rows, head)) < 1e-4


@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
def test_accumulated_gradient_is_that_of_the_large_batch(
    backbone: Backbone,
    delta: Delta | None,
    make_job: Callable[..., ClientJob],
    distance: Distance,
    cohort_tokens: int,
) -> None:
    # rows of 3 to 20 tokens, and a last micro-batch of one row: a mean of means would be far off
    jobs = [make_job(client, num_rows=7, lengths=(3, 20)) for client in range(2)]
    large = train(backbone, jobs, ONE_STEP, delta=delta)
    small = replace(ONE_STEP, batch_size=2, gradient_accumulation=4, cohort_tokens=cohort_tokens)
    for job, one, many in zip(jobs, large, train(backbone, jobs, small, delta=delta), strict=True):
        assert distance(step_of(job, many), step_of(job, one)) < 1e-4
        assert many.loss == pytest.approx(one.loss, rel=1e-5)
        assert many.steps == one.steps == 1


def test_clipping_is_per_client(
    backbone: Backbone, delta: Delta | None, make_job: Callable[..., ClientJob], distance: Distance
) -> None:
    jobs = [make_job(client) for client in range(3)]
    together = replace(ONE_STEP, cohort_tokens=TOGETHER)
    free = [
        step_of(*pair)
        for pair in zip(jobs, train(backbone, jobs, together, delta=delta), strict=True)
    ]
    norms = sorted(np.linalg.norm(step) for step in free)
    bound = float(norms[0] + norms[1]) / 2  # clips two of the three
    clipped = train(backbone, jobs, replace(together, clip_norm=bound), delta=delta)
    for job, step, result in zip(jobs, free, clipped, strict=True):
        wanted = step * min(1.0, bound / float(np.linalg.norm(step)))
        assert distance(step_of(job, result), wanted) < 1e-4


@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
def test_proximal_gradient_is_that_of_the_penalised_loss(
    backbone: Backbone,
    delta: Delta | None,
    make_job: Callable[..., ClientJob],
    full_gradient: Callable[..., np.ndarray],
    distance: Distance,
    cohort_tokens: int,
) -> None:
    mu, rate = 0.7, 0.5
    jobs = [make_job(client) for client in range(2)]
    settings = replace(
        ONE_STEP,
        local_steps=2,
        learning_rate=rate,
        proximal_mu=mu,
        cohort_tokens=cohort_tokens,
    )
    for job, result in zip(jobs, train(backbone, jobs, settings, delta=delta), strict=True):
        # at the start the penalty has no gradient; after one step it is mu times the move
        first = job.adapter - rate * full_gradient(job, job.rows)
        moved = replace(job, adapter=first)
        slope = full_gradient(moved, job.rows) + mu * (first - job.adapter)
        assert distance(job.adapter - result.adapter, job.adapter - first + rate * slope) < 1e-4


def test_proximal_training_ends_where_pull_and_gradient_balance(
    backbone: Backbone,
    make_job: Callable[..., ClientJob],
    full_gradient: Callable[..., np.ndarray],
) -> None:
    mu = 10.0
    job = make_job(0)
    settings = replace(ONE_STEP, local_steps=80, learning_rate=0.02, proximal_mu=mu)
    [result] = train(backbone, [job], settings)
    pull = mu * (result.adapter - job.adapter)
    push = full_gradient(replace(job, adapter=result.adapter), job.rows)
    assert np.linalg.norm(push) > 0.1
    assert np.linalg.norm(push + pull) < 1e-2 * np.linalg.norm(push)


@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_other_side_stays_bit_equal(
    backbone: Backbone,
    delta: Delta | None,
    layout: AdapterLayout,
    make_job: Callable[..., ClientJob],
    side: str,
    optimizer: str,
    cohort_tokens: int,
) -> None:
    jobs = [make_job(client) for client in range(2)]
    settings = LocalSettings(
        batch_size=3,
        optimizer=optimizer,
        weight_decay=0.1,
        proximal_mu=0.1,
        clip_norm=1.0,
        side=side,
        cohort_tokens=cohort_tokens,
    )
    for job, result in zip(jobs, train(backbone, jobs, settings, delta=delta), strict=True):
        before = layout.unpack(job.adapter, 1.0)
        after = layout.unpack(result.adapter, 1.0)
        for name in before:
            a_is_equal = np.array_equal(before[name].lora_a, after[name].lora_a)
            b_is_equal = np.array_equal(before[name].lora_b, after[name].lora_b)
            assert (a_is_equal, b_is_equal) == (side == "b", side == "a")


def test_a_row_s_loss_does_not_depend_on_its_batch_mates(
    backbone: Backbone,
    spec: LoraSpec,
    make_row: Callable[..., Encoded],
    make_job: Callable[..., ClientJob],
) -> None:
    adapter = make_job(0).adapter
    short, long, other = make_row(1, 4), make_row(2, 17), make_row(3, 4)

    def losses_of(*shares: Share) -> torch.Tensor:
        stack = make_stack(backbone, spec, len(shares), "both")
        for client in range(len(shares)):
            stack.load(client, adapter)
        batch = collate(shares, torch.device("cpu"))
        return forward_backward(backbone, stack, batch, None)

    alone = losses_of(Share([short]))
    beside_long = losses_of(Share([long, short]))
    before_other = losses_of(Share([short, other]))
    of_two_clients = losses_of(Share([long, long]), Share([short]))
    for losses in (beside_long[-4:], before_other[:4], of_two_clients[-4:]):
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)


def trained_with(
    backbone: Backbone, job: ClientJob, weights: list[float] | None, **options: object
) -> LocalResult:
    own = None if weights is None else np.array(weights)
    [result] = train(backbone, [replace(job, row_weights=own)], ONE_STEP, **options)
    assert result.error == ""
    return result


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_row_weights_weigh_the_rows_gradients(
    backbone: Backbone,
    fixed_ids: tuple[int, ...],
    make_job: Callable[..., ClientJob],
    make_prompt_job: Callable[..., ClientJob],
    full_gradient: Callable[..., np.ndarray],
    distance: Distance,
    kind: str,
) -> None:
    job = make_job(1, num_rows=3) if kind == "lora" else make_prompt_job(1, num_rows=3)

    def of(rows: list[Encoded], weights: list[float] | None = None) -> tuple[np.ndarray, float]:
        own = replace(job, rows=rows)
        result = trained_with(backbone, own, weights, fixed_ids=fixed_ids)
        tokens = sum(len(row.targets) for row in rows)
        return tokens * step_of(own, result), tokens * result.first_loss

    one, two, three = job.rows
    plain, plain_loss = of([one, two, three])
    same, same_loss = of([one, two, three], [1, 1, 1])
    assert np.array_equal(plain, same)
    assert plain_loss == same_loss
    double, double_loss = of([one, two, three], [2, 2, 2])
    assert distance(double, 2 * plain) < 1e-5
    assert double_loss == pytest.approx(2 * plain_loss)
    # a row of weight 0 contributes nothing but its label tokens to the mean
    assert distance(of([one, two, three], [1, 0, 1])[0], of([one, three])[0]) < 1e-4
    # an integer weight is a repeated row; a step's mean over label tokens is a sum here
    repeated, repeated_loss = of([one, one, one, three])
    weighted, weighted_loss = of([one, two, three], [3, 0, 1])
    assert distance(weighted, repeated) < 1e-4
    assert weighted_loss == pytest.approx(repeated_loss, rel=1e-5)
    if kind == "lora":
        by_hand = 0.5 * _sum_gradient(full_gradient, job, [one])
        by_hand = by_hand + 4 * _sum_gradient(full_gradient, job, [two])
        assert distance(of([one, two], [0.5, 4])[0], by_hand) < 1e-4


def _sum_gradient(
    full_gradient: Callable[..., np.ndarray], job: ClientJob, rows: list[Encoded]
) -> np.ndarray:
    return full_gradient(job, rows) * sum(len(row.targets) for row in rows)


def test_row_weights_follow_their_rows_through_steps_and_cohorts(
    backbone: Backbone, make_job: Callable[..., ClientJob], distance: Distance
) -> None:
    """Weights 0 and 1 over epochs of small batches are training in which the others' loss does not exist."""
    weights = [np.array([0, 1, 0, 1, 1.0]), np.array([1, 0, 0, 1, 0, 1, 1.0])]
    jobs = [make_job(k, num_rows=len(own)) for k, own in enumerate(weights)]
    jobs[0].rows.append(replace(jobs[0].rows[0], predict_from=np.empty(0), targets=np.empty(0)))
    weights[0] = np.append(weights[0], 7.0)  # of the row without label tokens, which is left out
    jobs = [replace(job, row_weights=own) for job, own in zip(jobs, weights, strict=True)]
    settings = replace(ONE_STEP, batch_size=2, local_steps=0, local_epochs=2, learning_rate=0.2)
    apart = train(backbone, jobs, settings)
    joint = train(backbone, jobs, replace(settings, cohort_tokens=TOGETHER))
    spoiled = [
        replace(
            job,
            rows=[
                row if weight else replace(row, targets=(row.targets + 1) % 300)
                for row, weight in zip(job.rows, own, strict=True)
            ],
        )
        for job, own in zip(jobs, weights, strict=True)
    ]
    for job, one, many, other in zip(
        jobs, apart, joint, train(backbone, spoiled, settings), strict=True
    ):
        assert one.error == ""
        assert np.array_equal(one.adapter, other.adapter)
        assert distance(many.adapter - job.adapter, one.adapter - job.adapter) < 1e-4


def test_loss_is_the_mean_over_the_label_tokens_of_each_step(
    backbone: Backbone, make_job: Callable[..., ClientJob]
) -> None:
    job = make_job(4)
    settings = replace(ONE_STEP, batch_size=2, local_steps=0, learning_rate=0.0)
    frozen = replace(job, adapter=np.zeros_like(job.adapter))  # the plain model
    [result] = train(backbone, [frozen], settings)
    means = []
    for [indices] in plan_steps(len(job.rows), settings, job.seed):
        rows = [job.rows[i] for i in indices]
        sums = evaluate(backbone, rows)
        means.append(sums.loss_sum / sums.label_tokens)
    assert result.first_loss == pytest.approx(means[0], rel=1e-5)
    assert result.loss == pytest.approx(np.mean(means), rel=1e-5)
    assert result.steps == 3
    assert result.tokens == sum(len(row.input_ids) for row in job.rows)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ascending_goes_the_other_way_by_the_same_step(
    backbone: Backbone, make_job: Callable[..., ClientJob], optimizer: str
) -> None:
    job = make_job(0)
    base = replace(ONE_STEP, optimizer=optimizer, learning_rate=0.01)  # type: ignore[arg-type]
    [down], [up] = (
        train(backbone, [job], replace(base, ascend=ascend)) for ascend in (False, True)
    )
    assert np.abs(step_of(job, down)).max() > 0
    np.testing.assert_allclose(step_of(job, up), -step_of(job, down), rtol=1e-4, atol=1e-6)
