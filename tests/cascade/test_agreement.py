from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.cascade import levels_of, majority_is_right, score_vote, vote
from fedllm_flwr.errors import ConfigError, ShapeError

answers = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9)


def test_votes_by_hand() -> None:
    found = vote(["b", "a", "b", None, "b"])
    assert (found.label, found.members, found.level) == ("b", (0, 2, 4), 0.6)
    assert vote([None, None]).level == 0
    assert vote(["a"]).level == 1


def test_four_of_five_are_enough_at_point_eight() -> None:
    found = vote(["a", "a", "b", "a", "a"])
    assert found.accepted(0.8)
    assert not found.accepted(0.81)
    assert not vote(["a", "a", "b", "a", "b"]).accepted(0.8)


@given(answers)
def test_the_level_is_the_largest_count_over_all_members(labels: list[str | None]) -> None:
    found = vote(labels)
    counts = Counter(label for label in labels if label is not None)
    assert found.level == max(counts.values(), default=0) / len(labels)
    assert found.level in levels_of(len(labels))
    if counts:
        assert counts[found.label] == max(counts.values())
        assert all(labels[place] == found.label for place in found.members)
        tied = [label for label in counts if counts[label] == counts[found.label]]
        assert found.label == min(tied, key=labels.index), "the first of equals"


@given(st.integers(1, 6), st.floats(0, 1))
def test_answers_that_cannot_be_parsed_never_agree(members: int, theta: float) -> None:
    found = vote([None] * members)
    assert found.level == 0
    assert not found.accepted(theta)
    assert not found.accepted(0.0)
    assert vote(["a", *[None] * members]).level == 1 / (members + 1)


def test_scores_by_hand_and_what_other_members_count() -> None:
    found = score_vote(["a", "b", "a"], [0.9, 1.0, 0.6])
    assert (found.label, found.members) == ("a", (0, 2))
    assert found.level == pytest.approx(0.5)


@given(answers)
def test_scores_of_one_are_votes_and_lower_scores_never_raise_the_level(
    labels: list[str | None],
) -> None:
    assert score_vote(labels, [1.0] * len(labels)) == vote(labels)
    assert score_vote(labels, [0.5] * len(labels)).level <= vote(labels).level


def test_the_majority_is_as_right_as_its_members() -> None:
    found = vote(["a", "b", "a"])
    assert majority_is_right(found, [True, False, True])
    assert not majority_is_right(found, [False, True, False])
    assert not majority_is_right(vote([None, None]), [False, True])
    with pytest.raises(ConfigError, match=r"answer 'a': expected the same correctness .* got both"):
        majority_is_right(found, [True, True, False])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one member, got none"):
        vote([])
    with pytest.raises(ShapeError, match="a score for each of 2 members, got 1"):
        score_vote(["a", "b"], [1.0])
    with pytest.raises(ConfigError, match=r"scores in \[0, 1\], got 2"):
        score_vote(["a"], [2.0])
    with pytest.raises(ConfigError, match="members >= 1, got 0"):
        levels_of(0)
