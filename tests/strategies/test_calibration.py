import json
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.cascade import solve
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.settings.cascade import CascadeConfig, MemberConfig, TierConfig
from fedllm_flwr.tiers import Computing, LocalMember, Tier, pack_tier, tier_histogram
from strategies.calibration import FederatedCalibration
from strategies.hosting import Hosting

Fixture = Callable[..., Any]
SMALL = TierConfig(name="small", members=(MemberConfig(model="tiny"),), kind="self_consistency", samples=3,
                   temperature=0.7)  # fmt: skip
LARGE = TierConfig(name="large", members=(MemberConfig(model="tiny"),))
CASCADE = CascadeConfig(name="c", tiers=(SMALL, LARGE), risk=0.9)
MEMBER = LocalMember("tiny", ModelRef("tiny"), max_tokens=48, computing=Computing("float32", "cpu"))
TIER = Tier(SMALL, (MEMBER,), seed=1)


class Account:
    """Counts messages and keeps failures."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []
        self.failures: list[tuple[int, str]] = []

    def count(self, kind: str, direction: str, message: Message) -> None:
        self.messages.append((kind, direction))

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        self.failures.append((partition_id, reason))


def strategy_on(config: RunConfig, grid: Any) -> FederatedCalibration:
    account = Account()
    hosting = Hosting(grid, 5.0, print, account.count)
    hosting.refresh()
    return FederatedCalibration(config, hosting, account, pack_tier(TIER), CASCADE)


@pytest.fixture(scope="module")
def config(micro: Fixture) -> RunConfig:
    found: RunConfig = micro("strategy.min_fraction=0.7", "task.validation_rows=40")
    return found


def pooled(config: RunConfig) -> Any:
    work = open_workspace(json.dumps(json.loads(config.to_json()) | {"out_dir": ""}))
    rows = work.rows(records.POOLED).validation
    return tier_histogram(TIER, work.task, rows), rows


def test_the_threshold_is_that_of_pooled_rows(config: RunConfig, edge_grid: Fixture) -> None:
    wanted, _ = pooled(config)
    for nodes in (1, 2):
        grid = edge_grid(nodes)
        strategy = strategy_on(config, grid)
        found = strategy.calibrate(grid)
        assert found == solve(wanted, 0.9, 0.95)
        assert found.total == wanted.total.sum() > 0
        assert strategy.counts is not None
        assert strategy.counts.correct.tolist() == wanted.correct.tolist()


def test_nothing_but_counts_leaves_a_client(
    config: RunConfig, edge_grid: Fixture, wire_bytes: Callable[[Message], bytes]
) -> None:
    grid = edge_grid(2)
    strategy_on(config, grid).calibrate(grid)
    _, rows = pooled(config)
    replies = [m for m in grid.replies if m.metadata.message_type == records.CALIBRATE]
    clients = [
        info for reply in replies for info in records.read(reply, records.ANSWER)[0]["clients"]
    ]
    assert len(clients) == 4
    for info in clients:
        assert set(info) == {"partition-id", "correct", "total"}
        assert len(info["correct"]) == len(info["total"]) == 4
    for message in (*grid.sent, *replies):
        sent = wire_bytes(message)
        for row in rows:
            assert row.text.encode() not in sent
            assert row.row_id.encode() not in sent
    for reply in replies:
        sent = wire_bytes(reply)
        assert not any(word in sent for word in (b"animal", b"food", b"music", b"weather"))
        assert b"ArrayRecord" not in sent


def test_flowers_own_loop_drives_it_too(config: RunConfig, edge_grid: Fixture) -> None:
    grid = edge_grid(2)
    strategy = strategy_on(config, grid)
    result = Strategy.start(strategy, grid, ArrayRecord(), num_rounds=1)
    metrics = result.evaluate_metrics_clientapp[1]
    assert strategy.calibrated is not None
    assert metrics["theta"] == strategy.calibrated.theta
    assert metrics["clients"] == 4


def spoiled(wanted: dict[int, Any]) -> Callable[..., list[Message]]:
    """Rewrite what some clients said."""

    def tamper(asked: list[Message], replies: list[Message]) -> list[Message]:
        by_id = {message.metadata.message_id: message for message in asked}
        found = []
        for reply in replies:
            question = by_id[reply.metadata.reply_to_message_id]
            if question.metadata.message_type == records.CALIBRATE:
                body, _ = records.read(reply, records.ANSWER)
                for info in body["clients"]:
                    info |= wanted.get(info["partition-id"], {})
                reply = Message(records.answer(body, {}, "float32", 0), reply_to=question)
            found.append(reply)
        return found

    return tamper


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"correct": [0, 0, 0, 9], "total": [0, 0, 0, 8]}, "correct <= total"),
        ({"total": [0, 0, 0]}, "total: expected 4 counts"),
        ({"correct": None}, "correct: expected 4 counts"),
        ({"error": "broken"}, "broken"),
    ],
)
def test_a_client_with_impossible_counts_is_left_out(
    change: dict[str, Any], reason: str, config: RunConfig, edge_grid: Fixture
) -> None:
    grid = edge_grid(2, spoiled({1: change}))
    strategy = strategy_on(config, grid)
    strategy.calibrate(grid)
    ((client, why),) = strategy.account.failures  # type: ignore[attr-defined]
    assert client == 1
    assert reason in why
    clean = strategy_on(config, edge_grid(2))
    clean.calibrate(clean.hosting.grid)
    assert strategy.counts is not None
    assert clean.counts is not None
    assert strategy.counts.total.sum() < clean.counts.total.sum()


def test_too_few_clients_stop_it(config: RunConfig, edge_grid: Fixture) -> None:
    broken = {"error": "broken"}
    grid = edge_grid(2, spoiled({1: broken, 2: broken}))
    with pytest.raises(RunStoppedError, match=r"calibration: 2 of 4 clients .*min_fraction=0.7"):
        strategy_on(config, grid).calibrate(grid)


def test_a_removed_client_is_not_asked(micro: Fixture, edge_grid: Fixture) -> None:
    removed = micro("task.validation_rows=40", "unlearning.removed=[2]", "unlearning=ledger")
    strategy = strategy_on(removed, edge_grid(2))
    empty = ArrayRecord({})
    asked = [
        partition_id
        for message in strategy.configure_evaluate(1, empty, ConfigRecord(), strategy.hosting.grid)
        for partition_id in records.read_body(message)["partition-ids"]
    ]
    assert sorted(asked) == [0, 1, 3]
