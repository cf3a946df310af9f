import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.fairness import (
    GroupSums,
    accuracy_gap,
    bootstrap,
    group_figures,
    pool,
    worst_accuracy,
)

SUMS = {
    "north": GroupSums(30.0, 80, 100),
    "east": GroupSums(80.0, 60, 100),
    "tiny": GroupSums(9.0, 0, 3),
    "none": GroupSums(),
}


def test_figures_by_hand_leave_tiny_groups_out_of_the_minimum_only():
    found = group_figures(SUMS, least_rows=50)
    assert list(found.groups) == ["east", "north", "tiny"]
    assert found.small == ("tiny",)
    assert (found.worst_group, found.worst_accuracy, found.worst_loss) == ("east", 0.6, 0.8)
    assert found.gap == pytest.approx(0.2)
    assert found.accuracy == pytest.approx(140 / 203)
    assert group_figures(SUMS, least_rows=3).worst_group == "tiny"


def test_without_a_large_group_there_is_no_worst():
    found = group_figures(SUMS, least_rows=1000)
    assert found.worst_group == ""
    assert math.isnan(found.worst_accuracy)
    assert math.isnan(found.gap)
    assert math.isnan(found.worst_loss)
    assert found.accuracy == pytest.approx(140 / 203)
    assert math.isnan(group_figures({}).accuracy)


groups = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1
)


@given(groups)
def test_the_worst_is_at_most_the_average_and_the_gap_is_not_negative(drawn):
    sums = {g: GroupSums(1.0, min(c, t), t) for g, (c, t) in drawn.items()}
    found = group_figures(sums, least_rows=1)
    assert found.worst_accuracy <= found.accuracy + 1e-12
    assert found.gap >= 0
    assert sums[found.worst_group].accuracy == found.worst_accuracy == worst_accuracy(sums)
    assert len(sums) > 1 or found.gap == 0


def rows(correct, total, group="a"):
    return [{group: GroupSums(0.5, int(i < correct), 1)} for i in range(total)]


def test_an_interval_of_independent_rows_has_the_width_of_the_normal_one():
    low, high = bootstrap(rows(150, 200), worst_accuracy, np.random.default_rng(0), draws=4000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 200)
    assert low == pytest.approx(0.75 - half, abs=0.012)
    assert high == pytest.approx(0.75 + half, abs=0.012)


def test_units_are_drawn_whole():
    """Ten clients of 100 equal rows know as much as ten rows."""
    clients = [{"a": GroupSums(0.0, 100 * (i < 7), 100)} for i in range(10)]
    low, high = bootstrap(clients, worst_accuracy, np.random.default_rng(0))
    assert high - low > 0.4


@pytest.mark.parametrize("figure", [worst_accuracy, accuracy_gap])
def test_the_interval_covers_the_figure_at_the_stated_rate(figure):
    random, truth, hits = np.random.default_rng(1), {"a": 0.9, "b": 0.6}, 0
    wanted = 0.6 if figure is worst_accuracy else 0.3
    for _ in range(150):
        units = [
            {group: GroupSums(0.0, int(random.random() < p), 1)}
            for group, p in truth.items()
            for _ in range(80)
        ]
        low, high = bootstrap(units, figure, random, draws=200)
        hits += low <= wanted <= high
    assert 0.88 <= hits / 150 <= 0.995


def test_a_loss_is_a_figure_too_and_tiny_groups_are_left_out_of_every_draw():
    units = [{"a": GroupSums(float(i % 2), 0, 1)} for i in range(60)] + rows(0, 3, "tiny")
    low, high = bootstrap(units, lambda sums: sums["a"].mean_loss, np.random.default_rng(0))
    assert 0.3 < low < 0.5 < high < 0.7
    assert pool(units)["tiny"].accuracy == 0
    seen = []
    bootstrap(units, lambda sums: seen.append(set(sums)) or 0.0, np.random.default_rng(0), draws=5)
    assert seen == [{"a"}] * 5


def test_the_generator_decides_the_interval():
    first, again, other = (
        bootstrap(rows(30, 60), worst_accuracy, np.random.default_rng(seed)) for seed in (4, 4, 5)
    )
    assert first == again != other


def test_no_group_that_counts_gives_no_interval():
    low, high = bootstrap(rows(1, 3), worst_accuracy, np.random.default_rng(0))
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    "change", [{"units": []}, {"draws": 0}, {"confidence": 1.0}, {"confidence": 0.0}]
)
def test_impossible_intervals_are_refused(change):
    arguments = {"units": rows(1, 3), "draws": 10, "confidence": 0.9} | change
    units = arguments.pop("units")
    with pytest.raises(ConfigError, match=r"^bootstrap: expected units, draws >= 1 and confidence"):
        bootstrap(units, worst_accuracy, np.random.default_rng(0), **arguments)
