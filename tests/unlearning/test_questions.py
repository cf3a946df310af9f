from dataclasses import replace

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.questions import Material, Plan, chosen, queries, shaped, sizes

PLAN = Plan(6, 5, reworded=3, paired=2, probed=4, candidates=9, relearn_steps=[1, 4], seed=7)  # type: ignore[arg-type]
MATERIAL = Material(8, 8, ("about", "other case"), ("pair",), 4, {}, True)


def test_every_answer_has_its_size() -> None:
    assert sizes(PLAN, MATERIAL) == {
        "members/losses": 6, "members/min_k": 6, "about/members": 3, "other case/members": 3, "paired/members": 2,
        "others/losses": 5, "others/min_k": 5, "about/others": 3, "other case/others": 3, "paired/others": 2,
        "probes/pair": 4, "relearn": 3, "canaries/losses": 4, "canaries/candidates": 36, "canaries/exact": 4,
    }  # fmt: skip
    assert queries(PLAN, MATERIAL) == {
        "membership": 11, "in other words": 12, "in pairs": 4, "in other forms": 4, "canaries": 40,
    }  # fmt: skip


def test_what_is_not_asked_has_no_answer() -> None:
    least = replace(PLAN, reworded=0, paired=0, probed=0, relearn_steps=(), candidates=0)
    bare = replace(MATERIAL, several_tokens=False)
    assert sizes(least, bare) == {"members/losses": 6, "others/losses": 5}
    assert queries(least, bare)["canaries"] == 0
    assert "canaries/losses" not in sizes(PLAN, replace(MATERIAL, canaries=0))


def test_candidates_of_a_canary_are_a_row() -> None:
    found = shaped({"canaries/candidates": np.arange(36.0), "relearn": np.zeros(3)}, PLAN)
    assert found["canaries/candidates"].shape == (4, 9)
    assert found["canaries/candidates"][1].tolist() == list(range(9, 18))
    assert found["relearn"].shape == (3,)


def test_a_plan_draws_the_same_rows_each_time() -> None:
    first = chosen("members", 8, 6, PLAN)
    assert len(set(first.tolist())) == 6
    assert set(first.tolist()) <= set(range(8))
    assert first.tolist() == chosen("members", 8, 6, PLAN).tolist()
    assert first.tolist() != chosen("others", 8, 6, PLAN).tolist()
    assert first[:3].tolist() == chosen("members", 8, 3, PLAN).tolist()


@pytest.mark.parametrize(
    "change", [{"members": -1}, {"reworded": 6}, {"paired": 6}, {"probed": 7}, {"relearn_steps": (2, 2)},
               {"relearn_steps": (0,)}, {"candidates": -1}],
)  # fmt: skip
def test_an_impossible_plan_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^plan: expected"):
        replace(PLAN, **change)
