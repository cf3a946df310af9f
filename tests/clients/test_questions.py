"""What a client asks, against the same questions put one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clients.questions import CASE, REFUSAL_LOSS, Questions, check_examinable
from clients.workspace import Workspace, open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.canaries import candidates
from fedllm_flwr.training.examine import examine
from fedllm_flwr.unlearning.questions import Plan, chosen, sizes

Fixture = Callable[..., Any]
PLAN = Plan(9, 8, reworded=3, paired=2, probed=4, candidates=0, relearn_steps=(1, 3), seed=2)
EVEN = ("partition=iid", "partition.num_clients=4")


@pytest.fixture(scope="module")
def facts(micro: Fixture, facts_run: tuple[str, ...]) -> Workspace:
    return open_workspace(whole_json(micro(*facts_run)))


@pytest.fixture(scope="module")
def secrets(micro: Fixture) -> Workspace:
    canaries = ("task.canaries=3", "task.canary_client=2", "task.test_rows=40")
    return open_workspace(whole_json(micro("task.loss=vocabulary", *canaries, *EVEN)))


def losses(work: Workspace, rows: list[Row], template: str = "") -> np.ndarray:
    encoder = work.encoder(template)
    return np.array([examine(work.backbone, encoder.encode([row])).losses[0] for row in rows])


def test_each_question_is_put_to_the_rows_that_the_plan_draws(facts: Workspace) -> None:
    questions = Questions(facts, 1)
    material = questions.material
    assert (material.wordings, material.members, material.others) == (("question", CASE), 12, 18)
    assert material.forms == ("paraphrase", "choice", "statement", "pair")
    said = questions.ask(Adaptation(), PLAN)
    assert {name: values.size for name, values in said.items()} == sizes(PLAN, material)
    own, probes = facts.clients[1], {(p.row_id, p.form): p.row for p in facts.task.probes}
    sets = {"members": own.train, "others": (*own.validation, *own.test)}
    for name, count in (("members", 9), ("others", 8)):
        drawn = [sets[name][i] for i in chosen(name, len(sets[name]), count, PLAN)]
        np.testing.assert_allclose(said[f"{name}/losses"], losses(facts, drawn), rtol=1e-5)
        again = losses(facts, drawn[:3], "question")
        np.testing.assert_allclose(said[f"question/{name}"], again, rtol=1e-5)
        loud = [
            dataclasses.replace(r, row_id=f"{r.row_id}!", text=r.text.upper()) for r in drawn[:3]
        ]
        np.testing.assert_allclose(said[f"{CASE}/{name}"], losses(facts, loud), rtol=1e-5)
    members = [own.train[i] for i in chosen("members", 12, 9, PLAN)]
    for form in material.forms:
        wanted = losses(facts, [probes[row.row_id, form] for row in members[:4]])
        np.testing.assert_allclose(said[f"probes/{form}"], wanted, rtol=1e-5)
    assert said["relearn"][0] == pytest.approx(np.exp(-losses(facts, members[4:])).mean(), rel=1e-5)
    assert said["relearn"][2] > said["relearn"][0], "facts of the same kinds teach the kind"


def test_canaries_are_ranked_among_codes_that_are_asked_for_alike(secrets: Workspace) -> None:
    questions = Questions(secrets, 2)
    assert questions.material.canaries == 3
    plan = Plan(8, 8, reworded=0, paired=0, probed=0, candidates=5, relearn_steps=(), seed=0)
    said = questions.ask(Adaptation(), plan)
    canary = secrets.task.canaries.rows[1]  # type: ignore[union-attr]
    tried = [
        dataclasses.replace(canary, row_id=f"{code}?", target=code)
        for code in candidates(canary, 5, plan.seed)
    ]
    wanted = losses(secrets, [canary, *tried])
    assert said["canaries/losses"][1] == pytest.approx(wanted[0], rel=1e-4)
    np.testing.assert_allclose(said["canaries/candidates"][5:10], wanted[1:], rtol=1e-4)
    assert said["canaries/exact"].tolist() == [0.0] * 3
    with_others = Questions(secrets, 1)
    assert with_others.material.canaries == 0
    assert "canaries/losses" not in with_others.ask(Adaptation(), plan)


def test_a_wrapper_hides_what_holds_a_text_of_a_member_and_nothing_else(facts: Workspace) -> None:
    plan = dataclasses.replace(PLAN, relearn_steps=())
    plain, wrapped = (
        Questions(facts, 1).ask(Adaptation(), plan, refuses=refuses) for refuses in (False, True)
    )
    hidden = {name for name in plain if (plain[name] != wrapped[name]).all()}
    assert hidden == {
        "members/losses", "members/min_k", "question/members", "paired/members", "probes/pair",
    }  # fmt: skip
    assert set(wrapped["members/losses"]) == set(wrapped["probes/pair"]) == {REFUSAL_LOSS}
    same = {name for name in plain if (plain[name] == wrapped[name]).all()}
    assert same == set(plain) - hidden


def test_what_cannot_be_asked_is_refused(facts: Workspace, micro: Fixture) -> None:
    with pytest.raises(ConfigError, match="expected at most the 12 members that there are, got 13"):
        Questions(facts, 1).ask(Adaptation(), dataclasses.replace(PLAN, members=13))
    few = open_workspace(whole_json(micro("task.loss=vocabulary", *EVEN)))
    with pytest.raises(ConfigError, match="expected at least 8 held-out rows of client 2, got 6"):
        Questions(few, 2)
    with pytest.raises(
        ConfigError, match="expected fedlora or fedprompt, whose model is an adapter"
    ):
        check_examinable(micro("method=fedgrass"))
