"""What holds for every objective of the table."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.fairness import OBJECTIVES, GroupSums, PlainMean
from fedllm_flwr.fairness.objectives import require, with_rows

every_objective = pytest.mark.parametrize("name", OBJECTIVES)
names = st.sampled_from("abcde")
counts_of = st.dictionaries(names, st.integers(0, 400), min_size=1).filter(
    lambda counts: sum(counts.values()) > 0
)


@st.composite
def rounds_of(draw):
    """Some rounds of sums; groups come, go and may have no rows."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        totals = draw(st.dictionaries(names, st.integers(0, 60)))
        found.append(
            {
                group: GroupSums(draw(st.floats(0, 5)) * total, draw(st.integers(0, total)), total)
                for group, total in totals.items()
            }
        )
    return found


def after(objective, rounds, groups=("a", "b")):
    state = objective.start(groups)
    for sums in rounds:
        state = objective.update(state, sums)
    return state


@every_objective
@given(rounds=rounds_of(), counts=counts_of)
@settings(deadline=None)
def test_the_mean_row_weight_is_one_and_no_weight_is_negative(name, rounds, counts):
    objective = OBJECTIVES[name]()
    weights = objective.row_weights(after(objective, rounds), counts)
    assert weights.keys() == {group for group, count in counts.items() if count}
    assert min(weights.values()) >= 0
    mean = sum(counts[group] * weight for group, weight in weights.items()) / sum(counts.values())
    assert mean == pytest.approx(1, abs=1e-9)


@every_objective
@given(rounds=rounds_of())
@settings(deadline=None)
def test_one_group_is_the_ungrouped_mean(name, rounds):
    objective = OBJECTIVES[name]()
    only = [{group: s for group, s in sums.items() if group == "a"} for sums in rounds]
    weights = objective.row_weights(after(objective, only, groups=["a"]), {"a": 17})
    assert weights == {"a": pytest.approx(1)}


@every_objective
@given(rounds=rounds_of(), size=st.integers(1, 99))
@settings(deadline=None)
def test_equal_multipliers_of_groups_of_one_size_give_the_plain_mean(name, rounds, size):
    objective = OBJECTIVES[name]()
    state = dict.fromkeys(after(objective, rounds), 0.2)
    weights = objective.row_weights(state, dict.fromkeys(state, size))
    assert weights == pytest.approx(dict.fromkeys(state, 1))


@every_objective
@given(rounds=rounds_of(), extra=rounds_of())
@settings(deadline=None)
def test_groups_join_once_and_keep_their_multiplier_without_rows(name, rounds, extra):
    objective = OBJECTIVES[name]()
    state = after(objective, rounds)
    assert list(state) == sorted({"a", "b"}.union(*rounds))
    for sums in extra:
        new = objective.update(state, sums)
        settled = objective.join(state, sums)
        for group in new.keys() - with_rows({g: s.total for g, s in sums.items()}).keys():
            assert new[group] == pytest.approx(settled[group], abs=1e-12)
        state = new
    assert all(math.isfinite(value) and value >= 0 for value in state.values())


@every_objective
def test_update_changes_no_argument_and_does_not_depend_on_the_order_of_groups(name):
    objective = OBJECTIVES[name]()
    state = objective.start(["b", "a"])
    before = dict(state)
    sums = {"b": GroupSums(40.0, 3, 20), "a": GroupSums(10.0, 18, 20)}
    assert list(state) == ["a", "b"]
    first = objective.update(state, sums)
    again = objective.update(dict(reversed(state.items())), dict(reversed(sums.items())))
    assert state == before
    assert first == again
    assert list(first) == list(again) == ["a", "b"]


@every_objective
def test_a_group_that_is_behind_never_weighs_less_than_one_that_is_ahead(name):
    objective = OBJECTIVES[name]()
    sums = {"ahead": GroupSums(10.0, 90, 100), "behind": GroupSums(90.0, 40, 100)}
    state = objective.start(sums)
    for _ in range(20):
        state = objective.update(state, sums)
    weights = objective.row_weights(state, {"ahead": 100, "behind": 100})
    assert 0 <= weights["ahead"] <= 1 <= weights["behind"]
    assert (weights["behind"] > 1.2) == (name != "mean")


@every_objective
def test_no_groups_at_all_is_a_round_without_news(name):
    objective = OBJECTIVES[name]()
    assert objective.start([]) == {}
    assert objective.update({}, {}) == {}
    assert objective.row_weights({}, {"a": 3}) == {"a": pytest.approx(1)}
    assert objective.row_weights({}, {"a": 0}) == {}


def test_the_plain_mean_ignores_its_state_and_has_no_constraint():
    assert PlainMean().row_weights({"a": 7.0}, {"a": 1, "b": 3}) == {"a": 1.0, "b": 1.0}
    assert PlainMean().slack({"a": GroupSums(1.0, 1, 2)}) == {}


def test_a_setting_out_of_range_is_named():
    require(True, "step: expected > 0", 1.0)
    with pytest.raises(ConfigError, match=r"^step: expected > 0, got -1\.0$"):
        require(False, "step: expected > 0", -1.0)
