from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, layer_shapes
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training import frozen_states
from fedllm_flwr.training.decoder import LeanDecoder
from fedllm_flwr.training.evaluate import evaluate
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.frozen_states import FrozenStates, entering_states, keep_at_most
from fedllm_flwr.training.local import ClientJob, LocalResult, train
from fedllm_flwr.training.settings import LocalSettings

UPPER = LoraSpec(rank=3, alpha=6.0, target_modules=("*.layers.1.self_attn.[qv]_proj",))
HEAD = (7, 3, 11)
SETTINGS = LocalSettings(
    optimizer="sgd", learning_rate=0.1, batch_size=2, local_epochs=2, cohort_tokens=200
)
MakeJob = Callable[..., ClientJob]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Each test says what may be kept."""
    keep_at_most(0)
    yield
    keep_at_most(0)


@pytest.fixture
def decoder(backbone: Backbone) -> LeanDecoder:
    found = find_decoder(backbone)
    assert found is not None
    return found


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Batch and length of every computation below the adapters from now on."""
    seen: list[tuple[int, int]] = []
    plain = LeanDecoder.entering

    def entering(self: LeanDecoder, input_ids: torch.Tensor, block: int) -> torch.Tensor:
        seen.append((len(input_ids), input_ids.shape[1]))
        return plain(self, input_ids, block)

    monkeypatch.setattr(LeanDecoder, "entering", entering)
    return seen


def trained(backbone: Backbone, jobs: list[ClientJob]) -> list[LocalResult]:
    return train(backbone, jobs, SETTINGS, head_token_ids=HEAD)


def jobs_of(make_job: MakeJob, backbone: Backbone) -> list[ClientJob]:
    """Two clients with rows of different lengths, and adapters in the upper block only."""
    layout = AdapterLayout(layer_shapes(backbone.ref, UPPER.target_modules), UPPER.rank)
    draws = np.random.default_rng(5)
    return [
        replace(
            make_job(client, num_rows=rows, labels=True),
            spec=UPPER,
            adapter=draws.normal(0, 0.3, layout.size).astype(np.float32),
        )
        for client, rows in ((0, 5), (1, 3))
    ]


def test_training_is_the_same_and_each_row_is_computed_once(
    backbone: Backbone, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(make_job, backbone)
    wanted = trained(backbone, jobs)
    keep_at_most(16)
    computed = count_blocks(monkeypatch)
    found = trained(backbone, jobs)
    for job, ours, theirs in zip(jobs, found, wanted, strict=True):
        step = np.linalg.norm(theirs.adapter - job.adapter)
        assert step > 0.01
        assert np.linalg.norm(ours.adapter - theirs.adapter) < 1e-5 * step
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert len(computed) == len({row.input_ids.tobytes() for job in jobs for row in job.rows})
    assert all(rows == 1 for rows, _ in computed)
    again = trained(backbone, jobs)
    assert len(computed) == 8
    assert all(np.array_equal(a.adapter, b.adapter) for a, b in zip(again, found, strict=True))


def test_the_bits_do_not_depend_on_what_is_kept(backbone: Backbone, make_job: MakeJob) -> None:
    """Full, empty, or too small for all rows: a run that is resumed starts with nothing."""
    jobs = jobs_of(make_job, backbone)
    keep_at_most(16)
    whole = trained(backbone, jobs)
    keep_at_most(0)
    keep_at_most(16)
    frozen_states._KEPT[find_decoder(backbone)] = FrozenStates(3000)  # type: ignore[index]
    little = trained(backbone, jobs)
    assert len(frozen_states._KEPT[find_decoder(backbone)]) < 8  # type: ignore[index]
    assert all(np.array_equal(a.adapter, b.adapter) for a, b in zip(whole, little, strict=True))


def test_evaluation_is_the_same(
    backbone: Backbone, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job, _] = jobs_of(make_job, backbone)

    def measured() -> tuple[float, int]:
        sums = evaluate(backbone, job.rows, head_token_ids=HEAD, adapter=job.adapter, spec=UPPER)
        return sums.loss_sum, sums.correct

    loss, correct = measured()
    keep_at_most(16)
    computed = count_blocks(monkeypatch)
    assert measured() == (pytest.approx(loss, rel=1e-5), correct)
    assert measured()[1] == correct
    assert len(computed) == len(job.rows)


def test_states_are_those_of_the_model_and_zero_at_padding(
    backbone: Backbone, decoder: LeanDecoder
) -> None:
    ids = torch.tensor([[5, 6, 7, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    with torch.no_grad():
        found = FrozenStates(1 << 20).entering(decoder, ids, (3, 1, 0), 1)
        wanted = backbone.model.base_model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found[0, :3], wanted[0, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :1], wanted[1, :1], rtol=1e-4, atol=1e-5)
    assert not found[0, 3:].any()
    assert not found[1, 1:].any()
    assert not found[2].any()


def test_a_row_that_ends_with_the_padding_token_is_not_cut(decoder: LeanDecoder) -> None:
    keep = FrozenStates(1 << 20)
    with torch.no_grad():
        long = keep.entering(decoder, torch.tensor([[5, 0, 0]]), (3,), 1)
        short = keep.entering(decoder, torch.tensor([[5, 0, 0]]), (1,), 1)
    assert long[0, 2].any()
    assert not short[0, 1:].any()


def test_the_budget_holds(decoder: LeanDecoder, backbone: Backbone) -> None:
    size = 4 * 4 * backbone.hidden_size
    keep = FrozenStates(2 * size)
    with torch.no_grad():
        for first in range(6):
            keep.entering(decoder, torch.tensor([[first, 1, 2, 3]]), (4,), 1)
            assert keep.held_bytes == min(first + 1, 2) * size
            assert len(keep) == min(first + 1, 2)
        keep.entering(decoder, torch.arange(9)[None], (9,), 1)  # larger than all of it
    assert keep.held_bytes == 2 * size


@pytest.mark.parametrize(("lengths", "lowest"), [((2,), 0), ((), 1)])
def test_nothing_is_kept_where_nothing_can_be(
    decoder: LeanDecoder, lengths: tuple[int, ...], lowest: int
) -> None:
    keep_at_most(16)
    ids = torch.tensor([[4, 5]])
    assert entering_states(decoder, ids, lengths, lowest) == (ids, 0)


def test_a_budget_of_zero_is_off(decoder: LeanDecoder) -> None:
    ids = torch.tensor([[4, 5]])
    assert entering_states(decoder, ids, (2,), 1) == (ids, 0)
    keep_at_most(16)
    assert entering_states(decoder, ids, (2,), 1)[1] == 1
