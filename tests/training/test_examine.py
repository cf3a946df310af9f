"""Every score against the full logits of each row alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_flwr.averaging import product_of
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.adapters import attach
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation import Adaptation, Generator, Query, Sampling
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training import examine as module
from fedllm_flwr.training.evaluate import row_scores
from fedllm_flwr.training.examine import Examination, answers, examine, prompt_of
from fedllm_flwr.training.local import ClientJob

HEAD = (7, 3, 11)
MakeJob = Callable[..., ClientJob]


def by_hand(logits: torch.Tensor, row: Encoded, share: float) -> tuple[np.ndarray, float, bool]:
    """Token losses, Min-K%++ and exactness from the logits [t, V] of one row, by the definitions."""
    wide = logits.double()
    logs = wide - wide.logsumexp(1, keepdim=True)
    own = logs[range(len(row.targets)), row.targets.tolist()]
    p = logs.exp()
    mean = (p * logs).sum(1)
    deviation = ((p * logs**2).sum(1) - mean**2).sqrt()
    normed = sorted(((own - mean) / deviation).tolist())
    least = normed[: max(1, int(share * len(normed)))]
    exact = logits.argmax(1).tolist() == row.targets.tolist()
    return -own.numpy(), float(np.mean(least)), exact


def check(
    found: Examination, rows: list[Encoded], logits: list[torch.Tensor], share: float
) -> None:
    for i, (row, own) in enumerate(zip(rows, logits, strict=True)):
        losses, min_k, exact = by_hand(own, row, share)
        np.testing.assert_allclose(found.token_losses[i], losses, rtol=1e-4, atol=1e-5)
        assert found.losses[i] == pytest.approx(losses.mean(), rel=1e-4)
        assert found.min_k[i] == pytest.approx(min_k, rel=1e-3)
        assert found.exact[i] == exact


@torch.no_grad()
def logits_of(backbone: Backbone, rows: list[Encoded]) -> list[torch.Tensor]:
    found = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        found.append(backbone.model(input_ids=ids).logits[0][row.predict_from.tolist()])
    return found


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_scores_are_those_of_each_row_alone(
    backbone: Backbone,
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    batch_tokens: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK_POSITIONS", chunk)
    job = make_job(5, num_rows=7, lengths=(4, 19))
    attached = attach(backbone, job.spec)
    attached.load_flat(job.adapter)
    with attached.active(train=False):
        logits = logits_of(backbone, job.rows)
    best = replace(job.rows[0], targets=logits[0].argmax(1).numpy().astype(np.int32))
    rows = [best, *job.rows[1:]]
    added = Adaptation(job.adapter, job.spec)
    found = examine(backbone, rows, added, share=0.4, batch_tokens=batch_tokens)
    check(found, rows, logits, 0.4)
    assert found.exact.tolist() == [True] + [False] * 6
    assert found.correct.tolist() == [-1] * 7


def test_a_delta_is_part_of_what_is_examined(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(3)
    attached = attach(backbone, job.spec)
    attached.load_flat(job.adapter)
    delta = {name: product_of(factors) for name, factors in attached.read().items()}
    found = examine(backbone, job.rows, Adaptation(delta=delta))
    with attached.active(train=False):
        check(found, job.rows, logits_of(backbone, job.rows), 0.2)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_prompt_is_in_its_place(
    backbone: Backbone,
    fixed_ids: tuple[int, ...],
    make_prompt_job: MakeJob,
    prompt_states: Callable[..., torch.Tensor],
    placement: str,
) -> None:
    job = make_prompt_job(5, placement=placement)
    at = len(fixed_ids) if placement == "after" else 0
    prompt = torch.from_numpy(job.adapter).view(job.spec.length, -1)
    with torch.no_grad():
        states = [prompt_states(row, prompt, at)[row.predict_from.tolist()] for row in job.rows]
        logits = [each @ backbone.head_weight().t() for each in states]
    added = Adaptation(job.adapter, job.spec, fixed_ids=fixed_ids)
    check(examine(backbone, job.rows, added), job.rows, logits, 0.2)


def test_under_the_labels_loss_the_softmax_is_over_the_labels(
    backbone: Backbone, make_job: MakeJob
) -> None:
    job = make_job(7, num_rows=8, labels=True)
    rows = [replace(row, label=-1) if i == 3 else row for i, row in enumerate(job.rows)]
    found = examine(backbone, rows, head_token_ids=HEAD)
    check(found, rows, [each[:, list(HEAD)] for each in logits_of(backbone, rows)], 0.2)
    _, _, correct = row_scores(backbone, rows, head_token_ids=HEAD)
    assert found.correct.tolist() == correct.tolist()
    assert {*found.correct.tolist()} == {-1, 0, 1}
    whole = [replace(row, targets=np.array([HEAD[int(row.targets[0])]], np.int32)) for row in rows]
    over_all = examine(backbone, whole, label_token_ids=HEAD)  # same choice, softmax over all
    assert over_all.correct.tolist() == correct.tolist()
    assert (over_all.losses > found.losses).all()


def test_answers_are_the_generators_own(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(4, num_rows=3)
    added = Adaptation(job.adapter, job.spec)
    sampling = Sampling(4, temperature=1.3, seeds=(1, 2))
    prompts = [tuple(row.input_ids[: row.predict_from[0] + 1].tolist()) for row in job.rows]
    assert [prompt_of(row) for row in job.rows] == prompts
    queries = [Query(prompt, sampling) for prompt in prompts]
    wanted = Generator(backbone, added).generate(queries)
    found = answers(backbone, job.rows, added, sampling=sampling)
    assert found == [tuple(sample.text for sample in own.samples) for own in wanted]
    assert len({text for own in found for text in own}) > 1
    greedy = answers(backbone, job.rows, sampling=Sampling(4))
    assert [len(own) for own in greedy] == [1, 1, 1]


def test_exact_rows_are_those_that_greedy_decoding_says(
    backbone: Backbone, make_job: MakeJob
) -> None:
    row = make_job(4, num_rows=1).rows[0]
    prompt = prompt_of(row)
    generator = Generator(backbone, stop_ids=frozenset())
    said = generator.generate([Query(prompt, Sampling(5))])[0].samples[0].token_ids
    own = replace(
        row,
        input_ids=np.array([*prompt, *said[:-1]], np.int32),
        predict_from=np.arange(len(prompt) - 1, len(prompt) + 4, dtype=np.int32),
        targets=np.array(said, np.int32),
    )
    other = replace(own, targets=np.array([*said[:-1], (said[-1] + 1) % 300], np.int32))
    assert examine(backbone, [own, other]).exact.tolist() == [True, False]


def test_impossible_calls_are_refused(backbone: Backbone, make_job: MakeJob) -> None:
    job = make_job(2)
    with pytest.raises(ConfigError, match="expected a share in"):
        examine(backbone, job.rows, share=0.0)
    with pytest.raises(ShapeError, match="flat adapter: expected"):
        examine(backbone, job.rows, Adaptation(job.adapter[1:], job.spec))
    nothing = examine(backbone, [])
    assert [nothing.losses.size, nothing.min_k.size, len(nothing.token_losses)] == [0, 0, 0]
