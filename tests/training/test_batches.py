import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import (
    MAX_PADDING,
    Share,
    by_length,
    collate,
    label_tokens,
    plan_steps,
    split_passes,
)
from fedllm_flwr.training.settings import LocalSettings


def plan(num_rows: int, seed: int = 0, **fields: int) -> list[list[list[int]]]:
    steps = plan_steps(num_rows, LocalSettings(**fields), seed)
    return [[micro_batch.tolist() for micro_batch in step] for step in steps]


def row(length: int, targets: int = 1) -> Encoded:
    return Encoded(
        row_id=f"{length}",
        input_ids=np.arange(1, length + 1, dtype=np.int32),
        predict_from=np.arange(length - targets, length, dtype=np.int32),
        targets=np.arange(targets, dtype=np.int32) + 50,
        label=-1,
        characters=1,
    )


@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_each_epoch_visits_every_row_once(
    num_rows: int, batch_size: int, accumulation: int, epochs: int
) -> None:
    steps = plan(
        num_rows, batch_size=batch_size, gradient_accumulation=accumulation, local_epochs=epochs
    )
    per_epoch = -(-num_rows // (batch_size * accumulation))
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        rows = [i for step in own for micro_batch in step for i in micro_batch]
        assert sorted(rows) == list(range(num_rows))
    sizes = [len(micro_batch) for step in steps for micro_batch in step]
    assert max(sizes) <= batch_size
    assert max(len(step) for step in steps) <= accumulation


@given(num_rows=st.integers(1, 20), local_steps=st.integers(1, 25))
def test_local_steps_decide_and_repeat_epochs(num_rows: int, local_steps: int) -> None:
    steps = plan(num_rows, batch_size=4, local_steps=local_steps)
    assert len(steps) == local_steps
    # the same steps as an endless run of epochs
    epochs = plan(num_rows, batch_size=4, local_epochs=local_steps)
    assert steps == epochs[:local_steps]


def test_the_order_depends_on_the_seed_and_the_epoch_only() -> None:
    assert plan(12, seed=5) == plan(12, seed=5)
    assert plan(12, seed=5) != plan(12, seed=6)
    first, second = plan(12, batch_size=12, local_epochs=2)
    assert first != second


def test_accumulation_and_large_batches_take_the_same_rows_in_a_step() -> None:
    small = plan(21, batch_size=2, gradient_accumulation=4)
    large = plan(21, batch_size=8)
    flat = [[i for micro_batch in step for i in micro_batch] for step in small]
    assert flat == [micro_batch for [micro_batch] in large]


def test_collate_by_hand() -> None:
    shares = [Share([row(3), row(1)], 0.5), Share([row(2, targets=2)], 0.25)]
    batch = collate(shares, torch.device("cpu"))
    # the second client has one row less, so a row of padding stands in
    assert batch.input_ids.tolist() == [[1, 2, 3], [1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert batch.positions.tolist() == [2, 3, 6, 7]
    assert batch.targets.tolist() == [50, 50, 50, 51]
    assert batch.weights.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert batch.owners.tolist() == [0, 0, 1, 1]
    assert batch.input_ids.dtype == torch.int64
    assert shares[0].tokens == 4
    assert label_tokens(shares[1].rows) == 2


def test_row_weights_weigh_every_label_token_of_a_row() -> None:
    rows = [row(5, targets=2), row(3), row(2, targets=2)]
    share = Share(rows, 0.5, np.array([2.0, 0.0, 0.25]))
    assert share.token_weights.tolist() == [1.0, 1.0, 0.0, 0.125, 0.125]
    assert share.token_weights.dtype == np.float32
    assert collate([share], torch.device("cpu")).weights.tolist() == share.token_weights.tolist()
    assert Share(rows, 0.5).token_weights.tolist() == [0.5] * 5


sizes = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=8)


@given(lengths=sizes)
def test_passes_hold_every_share_once_and_little_padding_between_clients(
    lengths: list[list[int]],
) -> None:
    shares = [Share([row(length) for length in own]) for own in lengths]
    passes = split_passes(shares)
    assert sorted(index for members in passes for index in members) == list(range(len(shares)))
    for members in passes:
        chosen = [shares[index] for index in members]
        positions = collate(chosen, torch.device("cpu")).input_ids.numel()
        own = sum(share.length * len(share.rows) for share in chosen)
        assert own >= (1 - MAX_PADDING) * positions


def test_equal_shares_make_one_pass() -> None:
    assert split_passes([Share([row(5), row(5)])] * 4) == [[0, 1, 2, 3]]


def test_a_reused_text_does_not_hide_padding() -> None:
    shares = [Share([row(48)]), Share([row(60)])]
    assert split_passes(shares) == [[0, 1]]
    assert split_passes(shares, extra=-40) == [[1], [0]]  # 8 and 20 positions are computed
    short = [Share([row(1)]), Share([row(4)])]
    assert split_passes(short) == [[1], [0]]
    assert split_passes(short, extra=20) == [[0, 1]]


def test_a_short_share_does_not_join_a_long_one() -> None:
    assert split_passes([Share([row(3)]), Share([row(30)]), Share([row(3)])]) == [[1], [0, 2]]


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    budget=st.integers(1, 200),
    extra=st.integers(0, 20),
)
def test_batches_for_evaluation_respect_the_budget(
    lengths: list[int], budget: int, extra: int
) -> None:
    rows = [row(length) for length in lengths]
    batches = list(by_length(rows, budget, extra))
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * (longest + extra) <= budget
