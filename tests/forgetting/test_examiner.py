from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.odd_client import ODD
from clients.questions import CASE, REFUSAL_LOSS, check_examinable
from clients.relearning import relearned, relearning_job
from clients.workspace import Workspace, open_workspace
from fedllm_flwr.compose import compose_run
from fedllm_flwr.core import resumed_config, whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.examining import adaptation_of
from fedllm_flwr.forgetting.examiner import LocalExaminer, NodeExaminer, examiner_for
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.training.examine import examine
from fedllm_flwr.unlearning.attacks import auc
from fedllm_flwr.unlearning.questions import PAIRED, Plan

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
    drawn = examiner._questions._drawn(plan)
    rows = [*drawn["members"], *drawn["others"]]
    assert [row.row_id in own for row in rows] == seen.tolist()


def test_too_few_rows_say_nothing() -> None:
    few = compose_run(["experiment=smoke", "task.train_rows=12", "task.test_rows=40"]).config
    with pytest.raises(ConfigError, match="at least 8 training rows of client 0"):
        LocalExaminer(few, 0)


@pytest.fixture(scope="module")
def work(config: Any) -> Workspace:
    return open_workspace(whole_json(config))


def losses(work: Workspace, model: Adaptation) -> np.ndarray:
    encoder = work.encoder()
    rows = encoder.encode(work.clients[ODD].train)
    return examine(work.backbone, rows, model, head_token_ids=encoder.head_token_ids).losses


def test_a_runs_model_says_what_the_run_measured(work: Workspace, odd: Fixture) -> None:
    """The evaluation of the last round, client by client, from the exported adapter."""
    run, _ = odd()
    model, encoder = adaptation_of(run, work.config), work.encoder()
    for record in run.records("evaluation")[-3:]:
        rows = encoder.encode(getattr(work.clients[record["partition_id"]], record["split"]))
        found = examine(work.backbone, rows, model, head_token_ids=encoder.head_token_ids)
        assert found.losses.sum() == pytest.approx(record["loss_sum"], rel=1e-3)


def test_relearning_begins_where_the_model_is_and_ascent_goes_up(
    work: Workspace, odd: Fixture
) -> None:
    model, encoder = adaptation_of(odd()[0], work.config), work.encoder()
    rows = encoder.encode(work.clients[ODD].train)
    job = relearning_job(work, model, rows, 3)
    before = losses(work, model)
    fresh = replace(model, adapter=job.adapter, spec=job.spec)
    np.testing.assert_array_equal(losses(work, fresh), before)
    for ascend, sign in ((False, 1), (True, -1)):
        tuned = relearned(work, job, model, 4, encoder, ascend=ascend)
        after = losses(work, replace(model, adapter=tuned.adapter, spec=tuned.spec))
        assert sign * (before.mean() - after.mean()) > 0
        assert tuned.seed != job.seed, "the next steps draw other orders"


def test_what_cannot_be_looked_at_is_named(smoke: Fixture) -> None:
    for overrides, match in (
        (("method=fedgrass", "strategy=row_mean", "client.clip_norm=0"), "expected fedlora or fedprompt"),
        (("method=fedprompt", "strategy=prompt_mean", "method.personal_length=2"), r"method\.personal_length"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            check_examinable(smoke(*overrides))


def test_in_a_deployment_the_clients_node_asks(source: RunDirectory, smoke: Fixture) -> None:
    far = ("runtime=deployment", "baselines=none")
    assert isinstance(examiner_for(source, smoke(*far), 0), NodeExaminer)
    own = (*far, "task=csv", "task.loss=vocabulary", "partition=site", "partition.num_clients=2")
    with pytest.raises(
        ConfigError, match="runtime=deployment and task=csv: the control by gradient"
    ):
        examiner_for(source, smoke(*own), 0)
