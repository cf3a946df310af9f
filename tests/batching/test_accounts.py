import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.batching.accounts import (
    ParallelAccount,
    decomposed_tokens,
    mean_queue_seconds,
    packing_saving,
    packing_saving_with_fallback,
    throughput_ceiling,
)
from fedllm_flwr.errors import ConfigError

TOKENS = st.floats(0.5, 1e4)


def test_the_slowest_part_and_the_search_for_parts_decide_the_parallel_time() -> None:
    account = ParallelAccount(12.0, (2.0, 3.0, 1.0), schema_seconds=0.75, join_seconds=0.25)
    assert account.parallel_seconds == 4.0
    assert (account.speedup, account.speedup_of_calls) == (3.0, 4.0)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(0, 5))
def test_a_prompt_of_n_parts_is_at_most_n_times_faster(parts: list[float], schema: float) -> None:
    account = ParallelAccount(sum(parts), tuple(parts), schema_seconds=schema)
    assert account.speedup <= account.speedup_of_calls <= len(parts) * (1 + 1e-12)


def test_every_part_carries_the_context() -> None:
    assert decomposed_tokens([5, 7], 100, [3, 4]) == 5 + 100 + 7 + 100 + 3 + 4
    with pytest.raises(ConfigError, match="an answer for each of 2 parts, got 1"):
        decomposed_tokens([5, 7], 100, [3])


def test_packing_saves_the_instruction_of_all_but_one_item() -> None:
    assert packing_saving(4, 90, 10) == 400 / 130
    assert packing_saving_with_fallback(4, 90, 10, 1) == pytest.approx(400 / (130 + 100))
    assert packing_saving_with_fallback(4, 90, 10, 0) == pytest.approx(400 / 130)


@given(st.integers(1, 200), TOKENS, TOKENS, st.data())
def test_packing_saves_between_nothing_and_n_times(
    items: int, instruction: float, item: float, data: st.DataObject
) -> None:
    saving = packing_saving(items, instruction, item)
    assert 1 - 1e-9 <= saving <= items + 1e-9
    failed = data.draw(st.integers(0, items))
    assert packing_saving_with_fallback(items, instruction, item, failed) <= saving * (1 + 1e-9)
    assert packing_saving_with_fallback(items, instruction, item, items) < 1  # all asked twice


def test_a_queue_grows_without_bound_at_the_ceiling() -> None:
    assert throughput_ceiling(32, 4.0) == 8.0
    assert mean_queue_seconds(0, 32, 4.0) == 0
    assert mean_queue_seconds(4, 32, 4.0) == pytest.approx(0.5 / (2 * 8 * 0.5))
    assert mean_queue_seconds(8, 32, 4.0) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [lambda: ParallelAccount(1.0, ()), lambda: ParallelAccount(-1.0, (1.0,)), lambda: packing_saving(0, 1, 1),
     lambda: packing_saving_with_fallback(2, 1, 1, 3), lambda: throughput_ceiling(1, 0.0),
     lambda: mean_queue_seconds(-1, 1, 1.0)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="expected"):
        wrong()  # type: ignore[operator]
