from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.odd_client import ODD
from clients.workspace import open_workspace
from fedllm_flwr.compose import compose_run
from fedllm_flwr.core import resumed_config, whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.forgetting.examiner import (
    CASE,
    PAIRED,
    REFUSAL_LOSS,
    LocalExaminer,
    Plan,
)
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.unlearning.attacks import auc

Fixture = Callable[..., Any]
PLAN = Plan(
    members=40,
    others=30,
    reworded=12,
    paired=8,
    probed=8,
    candidates=0,
    relearn_steps=(1, 3),
    seed=5,
)


@pytest.fixture(scope="module")
def source(odd: Fixture) -> RunDirectory:
    run: RunDirectory = odd()[0]
    return run


@pytest.fixture(scope="module")
def config(odd: Fixture) -> Any:
    run, rows = odd()
    found = resumed_config(run, None)
    return replace(found, runtime=replace(found.runtime, data_path=str(rows)))


@pytest.fixture(scope="module")
def examiner(config: Any) -> LocalExaminer:
    return LocalExaminer(config, ODD)


@pytest.fixture(scope="module")
def said(examiner: LocalExaminer, source: RunDirectory) -> dict[str, np.ndarray]:
    return examiner.examine(source, PLAN)


def test_the_full_model_knows_its_members_in_every_wording(said: dict[str, np.ndarray]) -> None:
    sizes = {name: values.size for name, values in said.items()}
    wordings = ("question", CASE)
    assert sizes == {
        "members/losses": 40, "others/losses": 30, "relearn": 3,
        **{f"{w}/{side}": 12 for w in wordings for side in ("members", "others")},
        f"{PAIRED}/members": 8, f"{PAIRED}/others": 8,
    }, "an answer of one token has no rare ones"  # fmt: skip
    assert auc(-said["members/losses"], -said["others/losses"]) > 0.7
    assert (said[f"{CASE}/members"] != said["members/losses"][:12]).any()
    assert (said[f"{PAIRED}/members"] != said["members/losses"][:8]).any()
    assert said["relearn"][-1] != said["relearn"][0]


def test_the_same_question_gets_the_same_answer(
    examiner: LocalExaminer, source: RunDirectory, said: dict[str, np.ndarray]
) -> None:
    again = examiner.examine(source, PLAN)
    for name, values in said.items():
        assert again[name].tobytes() == values.tobytes(), name


def test_a_wrapper_refuses_what_holds_a_members_text_and_nothing_else(
    examiner: LocalExaminer, source: RunDirectory, said: dict[str, np.ndarray]
) -> None:
    refused = examiner.examine(source, PLAN, refuses=True)
    for name, values in refused.items():
        hidden = name in ("members/losses", "question/members", f"{PAIRED}/members")
        assert (values == REFUSAL_LOSS).all() if hidden else np.array_equal(values, said[name]), (
            name
        )


def test_what_a_shadow_model_has_seen_is_what_its_client_trains_on(
    examiner: LocalExaminer, config: Any
) -> None:
    """Of the drawn rows, in their order: all members and others are drawn here."""
    material = examiner.material()
    plan = replace(PLAN, members=material.members, others=material.others)
    marked = replace(config.unlearning, name="none", retention="", shadowed=ODD, shadow=3)
    work = open_workspace(whole_json(replace(config, unlearning=marked)))
    seen = examiner.seen(3, plan)
    assert seen.sum() == len(work.clients[ODD].train)
    own = {row.row_id for row in work.clients[ODD].train}
    drawn = examiner._drawn(plan)
    rows = [*drawn["members"], *drawn["others"]]
    assert [row.row_id in own for row in rows] == seen.tolist()


def test_too_few_rows_say_nothing() -> None:
    few = compose_run(["experiment=smoke", "task.train_rows=12", "task.test_rows=40"]).config
    with pytest.raises(ConfigError, match="at least 8 training rows of client 0"):
        LocalExaminer(few, 0)
