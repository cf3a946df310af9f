from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import DataError
from fedllm_flwr.reservoir.series import mackey_glass, quantile_edges, windows
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.tasks import series_tasks
from fedllm_flwr.tasks.base import Row, TaskOptions
from fedllm_flwr.tasks.catalog import load_task

NAMES = ("level_routing", "mackey_glass")
LOADERS = {
    "level_routing": series_tasks.load_levels,
    "mackey_glass": series_tasks.load_mackey_glass,
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_follow_the_seed_and_say_what_they_are(name):
    first = load_task(TaskOptions(name=name), 0)
    assert first.splits == LOADERS[name](TaskOptions(name=name), 0).splits
    assert first.splits != load_task(TaskOptions(name=name), 1).splits
    assert first.series_width == 1
    for split, rows in first.splits.items():
        assert len({row.row_id for row in rows}) == len(rows)
        assert all(row.row_id.startswith(split) for row in rows)
        assert all(row.target == first.label_words[row.label] for row in rows)
    texts = [{row.text for row in rows} for rows in first.splits.values()]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


@pytest.mark.parametrize("name", NAMES)
def test_more_rows_begin_with_the_usual_ones(name):
    usual = LOADERS[name](TaskOptions(name=name), 3).splits
    asked = len(usual["test"]) + 7
    more = LOADERS[name](TaskOptions(name=name, test_rows=asked), 3).splits
    assert len(more["test"]) == asked
    assert more["test"][: len(usual["test"])] == usual["test"]
    assert more["train"] == usual["train"]


def test_levels_are_balanced_and_near_their_level():
    splits = load_task(TaskOptions(name="level_routing"), 0).splits
    assert len(splits["test"]) == 300
    for rows in splits.values():
        assert set(Counter(row.label for row in rows).values()) == {len(rows) // 3}
        for row in rows:
            values = series_tasks.parse_series(row, 1)
            assert values.shape == (16, 1)
            assert abs(values.mean() - series_tasks.LEVELS[row.label]) < 0.04
            assert values.min() >= 0


def test_the_class_of_a_window_is_the_quarter_of_the_value_that_follows():
    rows = load_task(TaskOptions(name="mackey_glass"), 0).splits["train"]
    series = np.stack([series_tasks.parse_series(row, 1)[:, 0] for row in rows])
    np.testing.assert_array_equal(series[1:, :-1], series[:-1, 1:], "windows follow one another")
    labels = np.array([row.label for row in rows])
    following = series[1:, -1]  # of every window but the last
    edges = np.quantile(following, [0.25, 0.5, 0.75])
    agree = np.searchsorted(edges, following, side="right") == labels[:-1]
    assert agree.mean() > 0.99, "but for the values at an edge, which are rounded"
    assert np.bincount(labels).max() - np.bincount(labels).min() <= 2


@given(
    st.lists(
        st.tuples(*[st.floats(-1e3, 1e3).map(lambda x: round(x, 4)) for _ in range(2)]), min_size=1
    )
)
def test_a_series_comes_back_step_by_step(steps):
    text = " ".join(f"{value:.4f}" for step in steps for value in step)
    found = series_tasks.parse_series(Row("r", text, "x", 0), 2)
    np.testing.assert_array_equal(found, np.array(steps, dtype=np.float32))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("0.1 up", r"^row r-7: expected numbers, could not convert string to float: 'up'$"),
        ("", r"^row r-7: expected at least one step of 2 numbers, got 0 numbers$"),
        ("1 2 3", r"^row r-7: expected at least one step of 2 numbers, got 3 numbers$"),
        ("1 nan", r"^row r-7: expected finite numbers, got NaN or infinity$"),
        ("1 inf", r"^row r-7: expected finite numbers, got NaN or infinity$"),
    ],
)
def test_a_text_that_is_no_series_is_named(text, match):
    with pytest.raises(DataError, match=match):
        series_tasks.parse_series(Row("r-7", text, "x", 0), 2)


def test_the_last_values_class_is_right_as_often_as_persistence():
    options = TaskOptions(name="mackey_glass")
    task = series_tasks.load_mackey_glass(options, 5)
    rows = task.splits["test"]
    found = series_tasks.last_value_classes(options, 5, rows)
    train = windows(mackey_glass(1230, derive_seed(5, "mackey_glass", "train")), 30)
    contexts, _ = windows(mackey_glass(430, derive_seed(5, "mackey_glass", "test")), 30)
    labels = np.array([row.label for row in rows])
    last = np.searchsorted(quantile_edges(train[1], 4), contexts[:, -1, 0], side="right")
    wanted = np.mean(last == labels)
    assert np.mean(found == labels) == pytest.approx(wanted, abs=1 / 400)  # four decimals of text
