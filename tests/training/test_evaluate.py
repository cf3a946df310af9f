"""Every figure against a naive loop, row by row through the full logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.adapters import attach
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.evaluate import EvalSums, evaluate, row_scores, scores
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


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_row_scores_are_those_of_each_row_alone(
    backbone: Backbone, make_job: MakeJob, batch_tokens: int
) -> None:
    job = make_job(6, num_rows=9)
    rows = [replace(row, label=i % 3 if i else -1) for i, row in enumerate(job.rows)]
    options = {"label_token_ids": HEAD, "adapter": job.adapter, "spec": job.spec}
    losses, tokens, correct = row_scores(backbone, rows, batch_tokens=batch_tokens, **options)
    for row, loss, count, right in zip(rows, losses, tokens, correct, strict=True):
        alone = evaluate(backbone, [row], **options)
        assert alone.loss_sum == pytest.approx(loss, rel=1e-5)
        assert (alone.label_tokens, alone.correct) == (count, max(right, 0))
        assert alone.total == int(right >= 0) == int(row.label >= 0)
    whole = evaluate(backbone, rows, batch_tokens=batch_tokens, **options)
    assert whole.loss_sum == losses.sum()
    assert row_scores(backbone, rows)[2].tolist() == [-1] * 9  # nothing to choose among
    assert [len(part) for part in row_scores(backbone, [])] == [0, 0, 0]


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_prompt_is_measured_in_its_place(
    backbone: Backbone,
    delta: Delta | None,
    fixed_ids: tuple[int, ...],
    make_prompt_job: MakeJob,
    prompt_states: Callable[..., torch.Tensor],
    placement: str,
    labels: bool,
) -> None:
    job = make_prompt_job(5, placement=placement, num_rows=8, labels=labels)
    head = HEAD if labels else None
    at = len(fixed_ids) if placement == "after" else 0
    prompt = torch.from_numpy(job.adapter).view(job.spec.length, -1)
    wanted = []
    with torch.no_grad():
        for row in job.rows:
            states = prompt_states(row, prompt, at)[row.predict_from.tolist()]
            logits = states @ backbone.head_weight().t()
            wanted.append(log_softmax(logits[:, list(head)] if head else logits, dim=1))
    options = {
        "adapter": job.adapter, "spec": job.spec, "fixed_ids": fixed_ids, "delta": delta,
        "batch_tokens": 40,
    }  # fmt: skip
    found = evaluate(backbone, job.rows, head_token_ids=head, **options)
    chosen = [
        values[range(len(row.targets)), row.targets.tolist()].sum()
        for row, values in zip(job.rows, wanted, strict=True)
    ]
    assert found.loss_sum == pytest.approx(-float(sum(chosen)), rel=1e-5)
    if labels:
        best = [int(values[0].argmax()) for values in wanted]
        assert found.correct == sum(
            choice == row.label for choice, row in zip(best, job.rows, strict=True)
        )
        options["label_token_ids"] = HEAD
        np.testing.assert_allclose(
            scores(backbone, job.rows, **options), torch.cat(wanted), rtol=1e-4, atol=1e-5
        )


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


def test_rows_without_the_fixed_text_are_refused(
    backbone: Backbone, fixed_ids: tuple[int, ...], make_prompt_job: MakeJob, make_job: MakeJob
) -> None:
    prompt = make_prompt_job(2)
    for measure in (evaluate, row_scores):
        with pytest.raises(ShapeError, match="expected it to begin with the 4 tokens"):
            measure(
                backbone, make_job(2).rows, adapter=prompt.adapter, spec=prompt.spec,
                fixed_ids=fixed_ids,
            )  # fmt: skip


def test_impossible_calls_are_refused(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(2)
    with pytest.raises(ConfigError, match="expected the specification of the adapter, got none"):
        evaluate(backbone, job.rows, adapter=job.adapter)
    with pytest.raises(ShapeError, match="flat adapter: expected"):
        evaluate(backbone, job.rows, adapter=job.adapter[1:], spec=job.spec)
