from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Sampling
from fedllm_flwr.serving.answering import Ask
from fedllm_flwr.serving.app import create_app
from fedllm_flwr.serving.chain_model import ChainModel, row_of
from fedllm_flwr.serving.rendering import Turn
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.settings.serving import ServingConfig
from fedllm_flwr.tasks.base import Task, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tiers import Answered, Chain, Computing, LocalMember, Tier

Fixture = Callable[..., Any]
MEMBER = LocalMember("tiny", ModelRef("tiny"), max_tokens=48, computing=Computing("float32", "cpu"))
CONFIG = (MemberConfig(model="tiny"),)
SMALL = TierConfig(name="small", members=CONFIG, kind="self_consistency", samples=3, temperature=0.7, price_in=0.1,
                   price_out=0.1)  # fmt: skip
CHAIN = Chain((Tier(SMALL, (MEMBER,)), Tier(TierConfig(name="large", members=CONFIG), (MEMBER,))), (1.0,))  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(TaskOptions(name="synthetic", test_rows=16), 0)


@pytest.fixture(scope="module")
def model(task: Task) -> ChainModel:
    return ChainModel("c", CHAIN, task)


def level_of(own: Answered) -> float | None:
    """Agreement where there is more than one member."""
    return own.level if own.tier == "small" else None


def ask(text: str, **options: Any) -> Ask:
    return Ask((Turn("user", text),), Sampling(**options))


def test_a_request_gets_what_the_chain_gives(model: ChainModel, task: Task) -> None:
    rows = task.splits["test"]
    heard: list[tuple[int, int, str]] = []
    asks = [ask(row.text) for row in rows]
    replies = model.answer(asks, lambda *told: not heard.append(told))  # type: ignore[func-returns-value]
    wanted = CHAIN.answer(task, [row_of(row.text) for row in rows])
    assert {reply.tier for reply in replies} == {"small", "large"}
    assert [(r.texts, r.tier, r.agreement, r.cost) for r in replies] == [
        ((own.text,), own.tier, level_of(own), float(own.cost)) for own in wanted
    ]
    assert heard == [(n, 0, reply.texts[0]) for n, reply in enumerate(replies)]
    deferred = next(reply for reply in replies if reply.tier == "large")
    assert deferred.output_tokens == 3 + 1, "the small tier's tokens count too"
    alone = [model.answer([one], lambda *_: True)[0] for one in asks]
    assert [(r.texts, r.tier) for r in alone] == [(r.texts, r.tier) for r in replies]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (ask("x", seeds=(1, 2)), "n: expected 1"),
        (ask("x", stop=(".",)), "stop: expected none"),
        (ask("x", top_p=0.5), "top_p: expected 1"),
        (ask("x", temperature=0.5), "temperature: expected 0, 1 or none"),
        (ask("  "), "expected a text"),
        (Ask((Turn("system", "s"), Turn("user", "x")), Sampling()), "one user turn, .* got system, user"),
    ],
)  # fmt: skip
def test_what_a_cascade_does_not_do_is_refused(model: ChainModel, asked: Ask, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.check(asked)


def test_a_response_says_tier_agreement_and_cost(model: ChainModel, task: Task) -> None:
    with TestClient(create_app(model, ServingConfig(max_wait_seconds=0.0))) as client:
        for row in task.splits["test"][:6]:
            body = {"model": "c", "messages": [{"role": "user", "content": row.text}]}
            response = client.post("/v1/chat/completions", json=body)
            (own,) = CHAIN.answer(task, [row_of(row.text)])
            assert response.json()["choices"][0]["message"]["content"] == own.text
            assert response.headers["x-fedllm-tier"] == own.tier
            said = response.headers.get("x-fedllm-agreement")
            level = level_of(own)
            assert said == (None if level is None else f"{level:.4g}")
            assert float(response.headers["x-fedllm-cost"]) == pytest.approx(float(own.cost))
