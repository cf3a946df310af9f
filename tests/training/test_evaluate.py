"""Every figure against a naive loop, row by row through the full logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.adapters import attach
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.evaluate import EvalSums, evaluate, scores
from fedllm_flwr.training.local import ClientJob

HEAD = (7, 3, 11)
MakeJob = Callable[..., ClientJob]


@contextmanager
def adapted(backbone: Backbone, job: ClientJob) -> Iterator[None]:
    attached = attach(backbone, job.spec)
    attached.load_flat(job.adapter)
    with torch.no_grad(), attached.active(train=False):
        yield


def log_probabilities(
    backbone: Backbone, row: Encoded, head: tuple[int, ...] | None
) -> torch.Tensor:
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    logits = backbone.model(input_ids=ids).logits[0][row.predict_from.tolist()]
    return log_softmax(logits if head is None else logits[:, list(head)], dim=1)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("labels", [True, False])
def test_sums_are_those_of_the_naive_loop(
    backbone: Backbone, make_job: MakeJob, labels: bool, batch_tokens: int
) -> None:
    job = make_job(5, num_rows=11, lengths=(4, 19), labels=labels)
    head = HEAD if labels else None
    found = evaluate(
        backbone,
        job.rows,
        head_token_ids=head,
        adapter=job.adapter,
        spec=job.spec,
        batch_tokens=batch_tokens,
    )
    loss, correct = 0.0, 0
    with adapted(backbone, job):
        for row in job.rows:
            values = log_probabilities(backbone, row, head)
            loss -= float(values[range(len(row.targets)), row.targets.tolist()].sum())
            correct += int(values[0].argmax()) == row.label
    assert found.loss_sum == pytest.approx(loss, rel=1e-5)
    assert found.label_tokens == sum(len(row.targets) for row in job.rows)
    assert found.characters == sum(row.characters for row in job.rows)
    assert (found.correct, found.total) == ((correct, len(job.rows)) if labels else (0, 0))


def test_accuracy_under_the_vocabulary_loss_chooses_among_the_label_tokens(
    backbone: Backbone, make_job: MakeJob
) -> None:
    job = make_job(6, num_rows=9)
    rows = [replace(row, label=i % 3 if i else -1) for i, row in enumerate(job.rows)]
    found = evaluate(backbone, rows, label_token_ids=HEAD, batch_tokens=50)
    with torch.no_grad():
        best = [int(log_probabilities(backbone, row, HEAD)[0].argmax()) for row in rows]
    correct = sum(choice == row.label for choice, row in zip(best, rows, strict=True))
    assert (found.correct, found.total) == (correct, 8)  # the row without a label does not count
    plain = evaluate(backbone, rows)
    assert plain == replace(found, correct=0, total=0, loss_sum=plain.loss_sum)
    assert plain.loss_sum == pytest.approx(found.loss_sum, rel=1e-5)


def test_scores_are_log_probabilities_in_the_order_of_the_rows(
    backbone: Backbone, make_job: MakeJob
) -> None:
    job = make_job(7, num_rows=8, lengths=(4, 19), labels=True)
    found = scores(
        backbone,
        job.rows,
        label_token_ids=HEAD,
        adapter=job.adapter,
        spec=job.spec,
        batch_tokens=40,
    )
    with adapted(backbone, job):
        wanted = torch.cat([log_probabilities(backbone, row, HEAD)[:1] for row in job.rows])
    assert found.shape == (8, 3)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, rtol=1e-5)
    sums = evaluate(backbone, job.rows, head_token_ids=HEAD, adapter=job.adapter, spec=job.spec)
    labels = [row.label for row in job.rows]
    assert sums.correct == int((found.argmax(axis=1) == labels).sum())
    assert sums.loss_sum == pytest.approx(-found[range(8), labels].sum(), rel=1e-4)


def test_sums_of_parts_are_the_sums_of_the_whole(backbone: Backbone, make_job: MakeJob) -> None:
    rows = make_job(8, num_rows=10, labels=True).rows
    whole = evaluate(backbone, rows, head_token_ids=HEAD)
    parts = evaluate(backbone, rows[:3], head_token_ids=HEAD)
    parts += evaluate(backbone, rows[3:], head_token_ids=HEAD)
    assert parts == replace(whole, loss_sum=parts.loss_sum)
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert evaluate(backbone, [], head_token_ids=HEAD) == EvalSums()


def test_evaluation_leaves_no_trace(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(9, labels=True)
    wet = replace(job.spec, dropout=0.5)
    before = evaluate(backbone, job.rows, head_token_ids=HEAD)
    state = torch.get_rng_state()
    dry = evaluate(backbone, job.rows, head_token_ids=HEAD, adapter=job.adapter, spec=job.spec)
    with_dropout = evaluate(backbone, job.rows, head_token_ids=HEAD, adapter=job.adapter, spec=wet)
    assert with_dropout == dry  # dropout acts in training only
    assert dry.loss_sum != before.loss_sum
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(backbone, job.rows, head_token_ids=HEAD) == before


def test_a_delta_is_part_of_what_is_measured(backbone: Backbone, make_job: MakeJob) -> None:
    from fedllm_flwr.averaging import product_of

    job = make_job(3, labels=True)
    attached = attach(backbone, job.spec)
    attached.load_flat(job.adapter)
    delta = {name: product_of(factors) for name, factors in attached.read().items()}
    wanted = evaluate(backbone, job.rows, head_token_ids=HEAD, adapter=job.adapter, spec=job.spec)
    found = evaluate(backbone, job.rows, head_token_ids=HEAD, delta=delta)
    assert found == replace(wanted, loss_sum=found.loss_sum)
    assert found.loss_sum == pytest.approx(wanted.loss_sum, rel=1e-4)


def test_impossible_calls_are_refused(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(2)
    with pytest.raises(ConfigError, match="expected the specification of the adapter, got none"):
        evaluate(backbone, job.rows, adapter=job.adapter)
    with pytest.raises(ShapeError, match="flat adapter: expected"):
        evaluate(backbone, job.rows, adapter=job.adapter[1:], spec=job.spec)
