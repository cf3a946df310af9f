import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_flwr.averaging import Delta, LowRank
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.local import ClientJob, plan_cohorts, train
from fedllm_flwr.training.settings import LocalSettings

MakeJob = Callable[..., ClientJob]
Distance = Callable[[np.ndarray, np.ndarray], float]
TOGETHER = 10_000
SGD = LocalSettings(batch_size=3, local_epochs=2, optimizer="sgd", learning_rate=0.2, momentum=0.9)
ADAMW = LocalSettings(batch_size=3, local_epochs=2, learning_rate=1e-2, weight_decay=0.01)


def unequal_jobs(make_job: MakeJob) -> list[ClientJob]:
    """Clients with 1 to 9 rows, of very different lengths."""
    sizes = ((4, (4, 12)), (9, (4, 12)), (1, (5, 5)), (6, (20, 30)))
    return [
        make_job(client, num_rows=num_rows, lengths=lengths)
        for client, (num_rows, lengths) in enumerate(sizes)
    ]


# Rounding differs between one product and several; AdamW turns it into steps where a gradient is near 0.
@pytest.mark.parametrize(("settings", "tolerance"), [(SGD, 1e-4), (ADAMW, 1e-3)])
@pytest.mark.parametrize("side", ["both", "b"])
def test_together_as_one_by_one(
    backbone: Backbone,
    delta: Delta | None,
    make_job: MakeJob,
    distance: Distance,
    settings: LocalSettings,
    tolerance: float,
    side: str,
) -> None:
    jobs = unequal_jobs(make_job)
    settings = replace(settings, side=side)
    apart = train(backbone, jobs, replace(settings, cohort_tokens=0), delta=delta)
    joint = train(backbone, jobs, replace(settings, cohort_tokens=TOGETHER), delta=delta)
    assert len(plan_cohorts(dict(enumerate(jobs)), replace(settings, cohort_tokens=TOGETHER))) == 1
    for job, one, many in zip(jobs, apart, joint, strict=True):
        assert (one.partition_id, one.error, many.error) == (job.partition_id, "", "")
        assert distance(many.adapter - job.adapter, one.adapter - job.adapter) < tolerance
        assert many.loss == pytest.approx(one.loss, rel=1e-5)
        counts = (one.num_examples, one.steps, one.tokens)
        assert (many.num_examples, many.steps, many.tokens) == counts
        assert one.num_examples == len(job.rows)
        assert one.steps == 2 * -(-len(job.rows) // 3)


@pytest.mark.parametrize("cohort_tokens", [0, 100, TOGETHER])
def test_twice_gives_the_same_bits(
    backbone: Backbone, make_job: MakeJob, cohort_tokens: int
) -> None:
    jobs = unequal_jobs(make_job)
    settings = replace(ADAMW, cohort_tokens=cohort_tokens)
    first, second = (train(backbone, jobs, settings) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert np.array_equal(one.adapter, two.adapter)
        assert one.loss == two.loss


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_order_of_the_clients_changes_no_bit(
    backbone: Backbone, make_job: MakeJob, spec: LoraSpec, dropout: float
) -> None:
    own_spec = replace(spec, dropout=dropout)
    jobs = [make_job(client, own_spec=own_spec) for client in range(4)]
    settings = replace(SGD, cohort_tokens=TOGETHER)
    forward = train(backbone, jobs, settings)
    backward = train(backbone, jobs[::-1], settings)[::-1]
    for one, two in zip(forward, backward, strict=True):
        assert np.array_equal(one.adapter, two.adapter)


def test_dropout_acts_and_is_never_batched(
    backbone: Backbone, make_job: MakeJob, spec: LoraSpec
) -> None:
    wet = [make_job(client, own_spec=replace(spec, dropout=0.5)) for client in range(2)]
    dry = [replace(job, spec=spec) for job in wet]
    settings = replace(SGD, cohort_tokens=TOGETHER)
    assert plan_cohorts(dict(enumerate(wet)), settings) == [[0], [1]]
    for one, two in zip(
        train(backbone, wet, settings), train(backbone, dry, settings), strict=True
    ):
        assert not np.array_equal(one.adapter, two.adapter)


def test_global_generators_and_backbone_are_left_alone(
    backbone: Backbone, make_job: MakeJob, spec: LoraSpec
) -> None:
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    python_side, torch_side = np.random.get_state(), torch.get_rng_state()
    jobs = [make_job(0), make_job(1), make_job(2, own_spec=replace(spec, dropout=0.3))]
    train(backbone, jobs, replace(ADAMW, cohort_tokens=TOGETHER))
    assert torch.equal(torch.get_rng_state(), torch_side)
    assert np.array_equal(np.random.get_state()[1], python_side[1])
    after = backbone.model.state_dict()
    assert set(after) == set(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_the_jobs_own_adapters_are_not_written_to(backbone: Backbone, make_job: MakeJob) -> None:
    jobs = [make_job(0), make_job(1)]
    before = [job.adapter.copy() for job in jobs]
    for cohort_tokens in (0, TOGETHER):
        for job, result in zip(
            jobs, train(backbone, jobs, replace(SGD, cohort_tokens=cohort_tokens)), strict=True
        ):
            assert not np.shares_memory(job.adapter, result.adapter)
    assert all(np.array_equal(job.adapter, old) for job, old in zip(jobs, before, strict=True))


@pytest.mark.parametrize("cohort_tokens", [0, TOGETHER])
def test_a_client_that_is_not_finite_fails_alone(
    backbone: Backbone,
    delta: Delta | None,
    make_job: MakeJob,
    distance: Distance,
    cohort_tokens: int,
) -> None:
    jobs = [make_job(client) for client in range(3)]
    good = train(backbone, jobs, replace(SGD, cohort_tokens=cohort_tokens), delta=delta)
    jobs[1].adapter[5] = np.nan
    found = train(backbone, jobs, replace(SGD, cohort_tokens=cohort_tokens), delta=delta)
    assert found[1].error == "client 1: loss is nan at step 1"
    assert np.array_equal(found[1].adapter, jobs[1].adapter, equal_nan=True)
    assert np.isnan(found[1].loss)
    assert found[1].num_examples == 0
    for index in (0, 2):
        assert found[index].error == ""
        update = found[index].adapter - jobs[index].adapter
        assert distance(update, good[index].adapter - jobs[index].adapter) < 1e-4


def test_an_update_that_overflows_at_the_last_step_is_an_error(
    backbone: Backbone, make_job: MakeJob
) -> None:
    settings = replace(SGD, local_steps=1, learning_rate=3e38, batch_size=8)
    [result] = train(backbone, [make_job(0)], replace(settings, weight_decay=1e30))
    assert result.error == "client 0: adapter is not finite after step 1"


def test_a_client_that_raises_fails_alone(
    backbone: Backbone, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [make_job(client) for client in range(3)]
    jobs[2] = replace(jobs[2], adapter=jobs[2].adapter[:-1])
    found = train(backbone, jobs, replace(SGD, cohort_tokens=TOGETHER))
    assert [bool(result.error) for result in found] == [False, False, True]
    assert found[2].error.startswith("client 2: ShapeError: flat adapter: expected")
    assert "training them one by one" in caplog.text
    alone = train(backbone, jobs[:2], replace(SGD, cohort_tokens=0))
    for one, two in zip(found[:2], alone, strict=True):
        assert np.array_equal(one.adapter, two.adapter)
    # the model is plain again, so the next message works
    assert not any(result.error for result in train(backbone, jobs[:2], SGD))


def test_a_token_outside_of_the_vocabulary_is_that_client_s_error(
    backbone: Backbone, make_job: MakeJob
) -> None:
    jobs = [make_job(client) for client in range(2)]
    jobs[0].rows[0].input_ids[0] = 10_000
    found = train(backbone, jobs, replace(SGD, cohort_tokens=TOGETHER))
    assert found[0].error == "client 0: training failed (IndexError); the node's log says why"
    assert found[1].error == ""


def test_no_rows_or_no_label_tokens(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(1, num_rows=2)
    bare = replace(job.rows[0], predict_from=job.rows[0].predict_from[:0], targets=np.empty(0))
    jobs = [
        replace(job, rows=[]),
        replace(job, rows=[bare]),
        replace(job, rows=[bare, job.rows[1]]),
    ]
    none, unlabelled, mixed = train(backbone, jobs, SGD)
    assert none.error == "client 1: expected rows with label tokens, got none in 0 rows"
    assert unlabelled.error == "client 1: expected rows with label tokens, got none in 1 rows"
    assert np.array_equal(none.adapter, job.adapter)
    assert (mixed.error, mixed.num_examples) == ("", 1)
    assert train(backbone, [], SGD) == []


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0], r"expected one for each of 2 rows, got shape \(1,\)"),
        ([1.0, -1.0], "expected finite numbers >= 0, got -1.0"),
        ([np.nan, 1.0], "expected finite numbers >= 0, got nan"),
    ],
)
def test_row_weights_that_do_not_fit_are_that_client_s_error(
    backbone: Backbone, make_job: MakeJob, weights: list[float], reason: str
) -> None:
    jobs = [make_job(0, num_rows=2), make_job(1, num_rows=2)]
    wrong = replace(jobs[1], row_weights=np.array(weights))
    good, bad = train(backbone, [jobs[0], wrong], SGD)
    assert good.error == ""
    assert re.match(f"client 1: row weights: {reason}", bad.error)


def test_clients_of_different_ranks_train_in_one_call(
    backbone: Backbone, make_job: MakeJob, spec: LoraSpec
) -> None:
    jobs = [make_job(client, own_spec=replace(spec, rank=1 + client % 2)) for client in range(4)]
    settings = replace(SGD, cohort_tokens=TOGETHER)
    assert plan_cohorts(dict(enumerate(jobs)), settings) in ([[0, 2], [1, 3]], [[2, 0], [3, 1]])
    for job, result in zip(jobs, train(backbone, jobs, settings), strict=True):
        assert result.error == ""
        assert result.adapter.shape == job.adapter.shape


def test_a_delta_counts_in_both_paths(
    backbone: Backbone, make_job: MakeJob, layout: AdapterLayout, distance: Distance
) -> None:
    draws = np.random.default_rng(0)
    delta = {
        shape.name: LowRank(
            0.1 * draws.standard_normal((shape.out_features, 2)).astype(np.float32),
            draws.standard_normal((2, shape.in_features)).astype(np.float32),
        )
        for shape in layout.layers
    }
    jobs = [make_job(client) for client in range(2)]
    apart = train(backbone, jobs, replace(SGD, cohort_tokens=0), delta=delta)
    joint = train(backbone, jobs, replace(SGD, cohort_tokens=TOGETHER), delta=delta)
    without = train(backbone, jobs, SGD)
    for job, one, many, plain in zip(jobs, apart, joint, without, strict=True):
        assert distance(many.adapter - job.adapter, one.adapter - job.adapter) < 1e-4
        assert abs(one.first_loss - plain.first_loss) > 1e-3


def test_cohorts_stay_within_the_budget_and_hold_every_client(make_job: MakeJob) -> None:
    jobs = {
        10 * client: make_job(client, num_rows=1 + client, lengths=(4 + client, 8 + client))
        for client in range(7)
    }
    for budget in (0, 1, 60, 150, 10_000):
        settings = LocalSettings(batch_size=3, cohort_tokens=budget)
        cohorts = plan_cohorts(jobs, settings)
        assert sorted(index for cohort in cohorts for index in cohort) == sorted(jobs)
        for cohort in cohorts:
            rows = max(min(3, len(jobs[index].rows)) for index in cohort)
            longest = max(len(row.input_ids) for index in cohort for row in jobs[index].rows)
            assert len(cohort) == 1 or len(cohort) * rows * longest <= budget
    assert len(plan_cohorts(jobs, LocalSettings(batch_size=3, cohort_tokens=10_000))) == 1
    assert len(plan_cohorts(jobs, LocalSettings(batch_size=3, cohort_tokens=0))) == 7


def test_cpu_time_is_shared_by_tokens(backbone: Backbone, make_job: MakeJob) -> None:
    jobs = [make_job(0, num_rows=3), make_job(1, num_rows=6)]
    one, two = train(backbone, jobs, replace(SGD, cohort_tokens=TOGETHER))
    assert one.cpu_seconds > 0
    assert one.cpu_seconds / one.tokens == pytest.approx(two.cpu_seconds / two.tokens)
