from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.prompt_start import embeddings_of, start_prompt
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.black_box import (
    BlackBoxResult,
    SearchSettings,
    random_projection,
    search,
    train_black_box,
)
from fedllm_flwr.training.evaluate import evaluate
from fedllm_flwr.training.local import ClientJob

MakeRow = Callable[..., Encoded]
FIXED = (60, 61, 62)
SPEC = PromptSpec((Segment("personal", 2), Segment("shared", 3)), "before")
SETTINGS = SearchSettings(dimension=8, population=6, generations=8)


def quadratic(projection: np.ndarray, start: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Loss |p - p*|² whose best prompt is start + A (1, ..., 1)."""
    best = start + projection.sum(axis=1)
    return lambda prompts: np.square(prompts - best).sum(axis=1)


def problem(own: SearchSettings, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    start = np.random.default_rng(seed).standard_normal(40).astype(np.float32)
    return start, random_projection(40, own, embedding_rms=0.5, seed=seed)


@pytest.fixture
def make_job(backbone: Backbone, make_row: MakeRow) -> Callable[..., ClientJob]:
    """A client whose rows begin with a fixed text."""

    def make(client: int, *, spec: PromptSpec = SPEC, num_rows: int = 4) -> ClientJob:
        rows = []
        for index in range(num_rows):
            row = make_row(100 * client + index, 6, prompt=5)
            row.input_ids[: len(FIXED)] = FIXED
            rows.append(row)
        start = start_prompt(embeddings_of(backbone), spec.length, "vocabulary", 3)
        return ClientJob(client, rows, start, spec, seed=31 + client)

    return make


@pytest.fixture
def projection(backbone: Backbone) -> np.ndarray:
    """Of all clients."""
    rms = embeddings_of(backbone).mean_rms
    return random_projection(5 * 64, SETTINGS, embedding_rms=rms, seed=9)


@pytest.fixture
def read_ids(backbone: Backbone) -> Iterator[list[np.ndarray]]:
    """Token ids of every batch that the model reads, while no gradient is wanted."""
    read: list[np.ndarray] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert not torch.is_grad_enabled()
        assert not output.requires_grad
        read.append(inputs[0].numpy().copy())

    handle = backbone.model.get_input_embeddings().register_forward_hook(note)
    yield read
    handle.remove()


def test_search_finds_the_minimum_of_a_quadratic() -> None:
    own = SearchSettings(dimension=6, population=10, generations=150)
    start, projection = problem(own)
    losses_of = quadratic(projection, start)
    found = search(losses_of, start, projection, own, seed=1)
    assert found.first_loss == pytest.approx(np.square(projection.sum(axis=1)).sum(), rel=1e-6)
    assert found.loss < 1e-6 * found.first_loss
    np.testing.assert_allclose(found.prompt, start + projection.sum(axis=1), atol=1e-3)
    assert found.loss == losses_of(found.prompt[None])[0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), generations=st.integers(1, 12), more=st.integers(1, 12))
def test_more_queries_never_give_worse(seed: int, generations: int, more: int) -> None:
    few = replace(SETTINGS, generations=generations)
    start, projection = problem(few, seed)
    losses_of = quadratic(projection, start)
    short = search(losses_of, start, projection, few, seed)
    many = replace(few, generations=generations + more)
    long = search(losses_of, start, projection, many, seed)
    assert long.loss <= short.loss <= short.first_loss
    assert short.queries == 1 + 6 * generations
    assert short.generations == generations


def test_every_candidate_is_in_the_subspace_and_counted() -> None:
    start, projection = problem(SETTINGS)
    asked: list[np.ndarray] = []

    def losses_of(prompts: np.ndarray) -> np.ndarray:
        asked.extend(prompts)
        return np.arange(float(len(prompts)))

    found = search(losses_of, start, projection, SETTINGS, seed=1)
    assert len(asked) == found.queries == 1 + 6 * 8
    steps = np.stack(asked) - start
    outside = steps.T - projection @ np.linalg.lstsq(projection, steps.T, rcond=None)[0]
    assert np.abs(outside).max() < 1e-5
    assert np.array_equal(asked[0], start)
    assert np.array_equal(found.prompt, start)  # nothing was better than the first loss of 0


def test_same_seed_same_result_whatever_the_global_generator() -> None:
    start, projection = problem(SETTINGS)
    losses_of = quadratic(projection, start)
    one = search(losses_of, start, projection, SETTINGS, seed=1)
    kept = np.random.get_state()
    try:
        np.random.seed(4)
        seeded = np.random.get_state()[1].copy()
        two = search(losses_of, start, projection, SETTINGS, seed=1)
        assert np.array_equal(np.random.get_state()[1], seeded)
    finally:
        np.random.set_state(kept)
    other = search(losses_of, start, projection, SETTINGS, seed=2)
    assert np.array_equal(one.prompt, two.prompt)
    assert not np.array_equal(one.prompt, other.prompt)


def test_losses_that_are_not_finite_never_win() -> None:
    start, projection = problem(SETTINGS)
    plain = quadratic(projection, start)

    def losses_of(prompts: np.ndarray) -> np.ndarray:
        losses = plain(prompts)
        losses[1::3] = np.nan
        losses[2::3] = -np.inf
        return losses

    found = search(losses_of, start, projection, SETTINGS, seed=1)
    assert np.isfinite(found.loss)
    assert found.loss < found.first_loss
    with pytest.raises(ArithmeticError, match="loss is nan before the first step"):
        search(lambda p: np.full(len(p), np.nan), start, projection, SETTINGS, seed=1)
    calls: list[int] = []

    def dies(prompts: np.ndarray) -> np.ndarray:
        calls.append(len(prompts))
        return np.ones(len(prompts)) if len(calls) == 1 else np.full(len(prompts), np.nan)

    assert np.array_equal(search(dies, start, projection, SETTINGS, seed=1).prompt, start)
    assert calls == [1, 6]


def test_projection_has_the_stated_spread() -> None:
    own = SearchSettings(dimension=50, sigma=2.0)
    found = random_projection(4000, own, embedding_rms=0.3, seed=1)
    assert found.dtype == np.float32
    assert found.std() == pytest.approx(0.3 / (np.sqrt(50) * 2.0), rel=0.02)
    steps = found @ (2.0 * np.random.default_rng(0).standard_normal((50, 20)))
    assert np.sqrt(np.mean(steps**2)) == pytest.approx(0.3, rel=0.1)
    assert np.array_equal(found, random_projection(4000, own, embedding_rms=0.3, seed=1))


@pytest.mark.parametrize("placement", ["before", "after"])
def test_clients_get_better_without_any_gradient(
    backbone: Backbone,
    make_job: Callable[..., ClientJob],
    projection: np.ndarray,
    read_ids: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    placement: str,
) -> None:
    spec = PromptSpec(SPEC.segments, placement)
    job = make_job(1, spec=spec)
    wrong = replace(make_job(2), rows=[])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    found, failed = train_black_box(backbone, [job, wrong], SETTINGS, projection, fixed_ids=FIXED)
    assert isinstance(found, BlackBoxResult)
    assert found.error == ""
    assert found.loss < found.first_loss
    assert (found.queries, found.steps, found.num_examples) == (1 + 6 * 8, 8, 4)
    assert found.tokens == found.queries * 4 * 6
    assert failed.error == "client 2: expected rows with label tokens, got none in 0 rows"
    assert (failed.queries, failed.num_examples) == (0, 0)
    for adapter, loss in ((job.adapter, found.first_loss), (found.adapter, found.loss)):
        sums = evaluate(backbone, job.rows, adapter=adapter, spec=spec, fixed_ids=FIXED)
        assert sums.loss_sum / sums.label_tokens == pytest.approx(loss, rel=1e-6)
    assert all(
        torch.equal(weights[name], value) for name, value in backbone.model.state_dict().items()
    )


def test_only_the_clients_own_rows_are_queried(
    backbone: Backbone,
    make_job: Callable[..., ClientJob],
    projection: np.ndarray,
    read_ids: list[np.ndarray],
) -> None:
    job, other = make_job(1), make_job(2)
    train_black_box(backbone, [job], SETTINGS, projection)  # the model's parts are probed once
    read_ids.clear()
    [alone] = train_black_box(backbone, [job], SETTINGS, projection)
    rows = {tuple(row.input_ids) for row in job.rows}
    asked = [tuple(row) for batch in read_ids for row in batch]
    assert set(asked) == rows
    assert len(asked) == alone.queries * len(rows)
    _, again = train_black_box(backbone, [other, job], SETTINGS, projection)
    assert np.array_equal(again.adapter, alone.adapter)


def test_segments_that_are_not_trained_stay_bit_equal(
    backbone: Backbone, make_job: Callable[..., ClientJob], projection: np.ndarray
) -> None:
    job = replace(make_job(1), trained=("shared",))
    [found] = train_black_box(backbone, [job], SETTINGS, projection)
    before, after = SPEC.split(job.adapter), SPEC.split(found.adapter)
    assert np.array_equal(before["personal"], after["personal"])
    assert not np.array_equal(before["shared"], after["shared"])
    [failed] = train_black_box(backbone, [replace(job, trained=("nobody",))], SETTINGS, projection)
    assert failed.error.startswith("client 1: ConfigError: prompt segment 'nobody'")
    assert np.array_equal(failed.adapter, job.adapter)


def test_row_weights_enter_the_loss(
    backbone: Backbone, make_job: Callable[..., ClientJob], projection: np.ndarray
) -> None:
    """Weight 2 on one row and 0 on another is that row twice and the other left out, with the same tokens."""
    job = make_job(1, num_rows=3)
    first, _, third = job.rows
    weighted = replace(job, row_weights=np.array([2.0, 0.0, 1.0]))
    repeated = replace(job, rows=[first, first, third])
    one, two = train_black_box(backbone, [weighted, repeated], SETTINGS, projection)
    assert one.first_loss == pytest.approx(two.first_loss, rel=1e-5)
    np.testing.assert_allclose(one.adapter, two.adapter, rtol=1e-3, atol=1e-4)
    [failed] = train_black_box(
        backbone, [replace(job, row_weights=np.ones(2))], SETTINGS, projection
    )
    assert "row weights: expected one for each of 3 rows" in failed.error


def test_misfits_are_named() -> None:
    start, projection = problem(SETTINGS)
    with pytest.raises(ShapeError, match=r"expected a projection of \(40, 8\) .* got \(40, 7\)"):
        search(lambda p: p[:, 0], start, projection[:, :7], SETTINGS, seed=0)
    for change, message in (
        ({"dimension": 1}, "search dimension: expected at least 2, got 1"),
        ({"population": 3}, "search population: expected at least 4, got 3"),
        ({"generations": 0}, "search generations: expected at least 1, got 0"),
        ({"sigma": 0.0}, "search sigma: expected a finite number > 0, got 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SETTINGS, **change)
