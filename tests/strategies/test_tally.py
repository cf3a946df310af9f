from typing import Any

import pytest

from fedllm_flwr.errors import WireError
from strategies.exchange import ClientReply
from strategies.tally import (
    MIN_GROUP_ROWS,
    SplitTally,
    checked_groups,
    checked_splits,
    client_figures,
)


def sums(correct: int, total: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "correct": correct,
        "total": total,
        "loss_sum": loss,
        "label_tokens": total,
        "characters": 9,
    }


def test_the_worst_decile_is_the_mean_of_the_worst_tenth_and_at_least_one() -> None:
    own = [k / 20 for k in range(20)]
    found = client_figures(own[::-1])
    assert found["worst_client_accuracy"] == 0.0
    assert found["worst_decile_accuracy"] == pytest.approx(0.025)
    assert found["mean_client_accuracy"] == pytest.approx(sum(own) / 20)
    assert client_figures([0.5, 0.7])["worst_decile_accuracy"] == 0.5
    of_eleven = client_figures([k / 30 for k in range(11)])
    assert of_eleven["worst_decile_accuracy"] == pytest.approx(0.5 / 30), "the worst two"
    assert client_figures([]) == {}


def test_groups_are_pooled_over_clients_before_they_are_compared() -> None:
    tally = SplitTally()
    tally.add(sums(90, 120), {"a": sums(60, 60), "b": sums(30, 60)})
    tally.add(sums(60, 120), {"a": sums(60, 120)})
    found = tally.figures("classification")
    assert found["accuracy"] == 150 / 240
    assert found["worst_group_accuracy"] == 0.5, "b: 30 of 60; a: 120 of 180"
    assert found["max_group_gap"] == pytest.approx(120 / 180 - 0.5)


def test_a_small_group_is_no_worst_group() -> None:
    tally = SplitTally()
    small = MIN_GROUP_ROWS - 1
    tally.add(sums(60, 60 + small), {"a": sums(60, 60), "b": sums(0, small)})
    found = tally.figures("classification")
    assert found["worst_group_accuracy"] == 1.0
    assert found["max_group_gap"] == 0.0


def test_without_rows_there_are_no_figures_of_clients_or_groups() -> None:
    tally = SplitTally()
    tally.add(sums(0, 0, 0.0), {})
    assert tally.figures("classification") == {}
    assert set(tally.figures("instruction")) <= {"bits_per_character"}


def test_groups_are_checked_like_splits() -> None:
    good = ClientReply(
        2, {"splits": {"test": sums(1, 2)}, "groups": {"test": {"a": sums(1, 2)}}}, {}
    )
    assert checked_groups(good, ("test",)) == {"test": {"a": sums(1, 2)}}
    assert checked_groups(ClientReply(2, {}, {}), ("test",)) == {"test": {}}
    assert checked_splits(good, ("test",)) == {"test": sums(1, 2)}
    bad = ClientReply(2, {"groups": {"test": {"a": {"correct": 1}}}}, {})
    with pytest.raises(WireError, match="client 2, group a: total: expected a whole number"):
        checked_groups(bad, ("test",))
    with pytest.raises(WireError, match="client 2: expected groups by split"):
        checked_groups(ClientReply(2, {"groups": 7}, {}), ("test",))


IMPOSSIBLE = [
    {"correct": 3},
    {"correct": -1},
    {"total": -2, "correct": -3},
    {"loss_sum": -0.5},
    {"label_tokens": 0},
    {"characters": -1},
]


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_sums_that_no_rows_have_are_refused(change: dict[str, Any]) -> None:
    spoiled = sums(1, 2) | change
    reply = ClientReply(2, {"splits": {"test": spoiled}, "groups": {"test": {"a": spoiled}}}, {})
    with pytest.raises(WireError, match="client 2: expected sums >= 0 and no more correct than"):
        checked_splits(reply, ("test",))
    with pytest.raises(WireError, match="client 2, group a: expected sums >= 0 and no more"):
        checked_groups(reply, ("test",))
