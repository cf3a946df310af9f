import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from flwr.app import Message

from clients.questions import Questions
from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.tiers import pack_adaptation
from fedllm_flwr.unlearning.questions import Plan, queries

Fixture = Callable[..., Any]
PLAN = Plan(8, 8, reworded=1, paired=1, probed=2, candidates=0, relearn_steps=(), seed=2)


@pytest.fixture(scope="module")
def config(micro: Fixture, facts_run: tuple[str, ...]) -> RunConfig:
    found: RunConfig = micro(*facts_run)
    return found


def asking(config: RunConfig, plan: Plan | None, client: int = 0) -> Message:
    facts, _ = pack_adaptation(Adaptation())
    body = {
        "config": json.loads(config.to_json()), "fingerprint": config.fingerprint(), "partition-ids": [client],
        "model": facts, "plan": asdict(plan) if plan else None, "refuses": False,
    }  # fmt: skip
    return Message(records.instruction(body, {}, "float32"), 1000, records.EXAMINE)


def told(
    config: RunConfig, plan: Plan | None, edge_grid: Fixture, forget: str = "0"
) -> tuple[Any, Any]:
    grid = edge_grid(1, node_config={"forget": forget})
    (reply,) = grid.send_and_receive([asking(config, plan)])
    body, parts = records.read(reply, records.ANSWER)
    return body["clients"][0], parts


def test_it_tells_what_it_has_to_ask_with_and_then_what_the_model_says(
    config: RunConfig, edge_grid: Fixture
) -> None:
    questions = Questions(open_workspace(whole_json(config)), 0)
    info, parts = told(config, None, edge_grid)
    assert info["material"] == json.loads(json.dumps(asdict(questions.material)))
    assert parts == {}
    info, parts = told(config, PLAN, edge_grid)
    assert info == {"partition-id": 0, "queries": queries(PLAN, questions.material)}
    wanted = questions.ask(Adaptation(), PLAN)
    assert set(parts) == {f"0/{name}" for name in wanted}
    for name, values in wanted.items():
        assert parts[f"0/{name}"] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("forget", ["", "1", "10, 1"])
def test_a_client_that_has_not_asked_to_be_forgotten_says_nothing(
    config: RunConfig, edge_grid: Fixture, forget: str
) -> None:
    info, parts = told(config, PLAN, edge_grid, forget)
    assert set(info) == {"partition-id", "error"}
    assert "expected one that has asked to be forgotten" in info["error"]
    assert parts == {}


def test_the_environment_names_the_client_too(
    config: RunConfig, edge_grid: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_FORGET", "3, 0")
    (reply,) = edge_grid(1).send_and_receive([asking(config, None)])
    assert "material" in records.read(reply, records.ANSWER)[0]["clients"][0]
