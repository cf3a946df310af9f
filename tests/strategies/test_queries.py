import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Strategy

from clients.workspace import Workspace, open_workspace
from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import WireError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.tiers import Computing, LocalMember, Tier, pack_tier
from fedllm_flwr.tiers.tier import agreement, is_right, text_of
from strategies import queries
from strategies.hosting import Hosting
from strategies.queries import FederatedQueries, checked_texts

Fixture = Callable[..., Any]
SMALL = TierConfig(name="small", members=(MemberConfig(model="tiny"),), kind="self_consistency", samples=3,
                   temperature=0.7)  # fmt: skip
MEMBER = LocalMember("tiny", ModelRef("tiny"), max_tokens=48, computing=Computing("float32", "cpu"))
TIER = Tier(SMALL, (MEMBER,), seed=1)
THETA = 1.0


class Account:
    """Counts bytes and keeps failures."""

    def __init__(self) -> None:
        self.bytes: dict[tuple[str, str], int] = {}
        self.failures: list[tuple[int, str]] = []

    def count(self, kind: str, direction: str, message: Message) -> None:
        key = (kind, direction)
        self.bytes[key] = self.bytes.get(key, 0) + records.serialized_bytes(message)

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        self.failures.append((partition_id, reason))


class Server:
    """The server's tiers: answers each text by a rule, and keeps the batches that it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        self.batches.append(list(texts))
        return [rule(text) for text in texts]


def rule(text: str) -> str | None:
    """An answer that only this text gets; it is never a label."""
    return None if len(text) % 7 == 0 else f"answer to {text}"


@pytest.fixture(scope="module")
def config(micro: Fixture) -> RunConfig:
    found: RunConfig = micro("task.test_rows=40", "strategy.min_fraction=0.5")
    return found


@pytest.fixture(scope="module")
def work(config: RunConfig) -> Workspace:
    return open_workspace(json.dumps(json.loads(config.to_json()) | {"out_dir": ""}))


def strategy_on(config: RunConfig, grid: Any, server: Server) -> FederatedQueries:
    account = Account()
    hosting = Hosting(grid, 5.0, print, account.count)
    hosting.refresh()
    return FederatedQueries(config, hosting, account, pack_tier(TIER), THETA, server)


def split(work: Workspace, partition_id: int) -> tuple[list[Any], list[Any]]:
    """A client's rows that its tier answers, with the answers, and those that it defers."""
    rows = work.rows(partition_id).test
    kept, deferred = [], []
    for row, replies in zip(rows, TIER.ask(work.task, rows), strict=True):
        agreed = agreement(replies)
        if agreed.accepted(THETA):
            kept.append((row, text_of(replies, agreed)))
        else:
            deferred.append(row)
    return kept, deferred


def test_every_query_is_answered_once_and_by_whom_it_must_be(
    config: RunConfig, work: Workspace, edge_grid: Fixture
) -> None:
    server = Server()
    grid = edge_grid(2)
    served = strategy_on(config, grid, server).serve(grid)
    parts = [split(work, p) for p in range(4)]
    deferred = [row for _, own in parts for row in own]
    assert 0 < len(deferred) < sum(len(kept) for kept, _ in parts) + len(deferred)
    assert [text for batch in server.batches for text in batch] == [row.text for row in deferred]
    assert served.clients == 4
    assert (served.queries, served.deferred) == (40, len(deferred))
    right = sum(is_right(work.task, row, text) for kept, _ in parts for row, text in kept)
    assert (served.correct, served.deferred_correct) == (right, 0)
    assert served.text_bytes == sum(len(row.text.encode()) for row in deferred)


def test_deferred_text_is_the_only_text_on_the_wire(
    config: RunConfig, work: Workspace, edge_grid: Fixture, wire_bytes: Callable[[Message], bytes]
) -> None:
    grid = edge_grid(2)
    strategy_on(config, grid, Server()).serve(grid)
    everything = b"".join(wire_bytes(message) for message in (*grid.sent, *grid.replies))
    replies = [m for m in grid.replies if m.metadata.message_type == records.PENDING]
    uplink = b"".join(wire_bytes(message) for message in replies)
    for partition_id in range(4):
        kept, deferred = split(work, partition_id)
        rows = work.rows(partition_id)
        for row in (*rows.train, *rows.validation, *(row for row, _ in kept)):
            assert row.text.encode() not in everything
        for row in deferred:
            assert row.text.encode() in uplink
        for row in (*rows.train, *rows.validation, *rows.test):
            assert row.row_id.encode() not in everything
    for reply in replies:
        for info in records.read(reply, records.ANSWER)[0]["clients"]:
            assert set(info) == {"partition-id", "queries", "input-tokens", "output-tokens", "deferred"}  # fmt: skip


def test_a_client_gets_the_answers_to_its_own_queries_and_no_others(
    config: RunConfig, work: Workspace, edge_grid: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches mix clients (of three queries here); messages do not."""
    monkeypatch.setattr(queries, "BATCH_QUERIES", 3)
    server, grid = Server(), edge_grid(2)
    strategy_on(config, grid, server).serve(grid)
    owner = {row.text: p for p in range(4) for row in split(work, p)[1]}
    assert max(len(batch) for batch in server.batches) == 3
    assert any(len({owner[text] for text in batch}) > 1 for batch in server.batches)
    seen = set()
    for message in grid.sent:
        if message.metadata.message_type != records.ANSWERS:
            continue
        body = records.read_body(message)
        (partition_id,) = body["partition-ids"]
        rows = work.rows(partition_id).test
        assert [rows[place].text for place, _ in body["answers"]] == [
            row.text for row in split(work, partition_id)[1]
        ]
        assert all(answer == rule(rows[place].text) for place, answer in body["answers"])
        assert "cascade" not in body, "the tier was sent before"
        seen.add(partition_id)
    assert seen == {0, 1, 2, 3}


def test_bytes_of_both_exchanges_are_counted(config: RunConfig, edge_grid: Fixture) -> None:
    grid = edge_grid(2)
    strategy = strategy_on(config, grid, Server())
    strategy.serve(grid)
    counted = strategy.account.bytes  # type: ignore[attr-defined]
    for kind in (records.PENDING, records.ANSWERS):
        for direction, messages in (("downlink", grid.sent), ("uplink", grid.replies)):
            own = [m for m in messages if m.metadata.message_type == kind]
            assert counted[kind, direction] == sum(records.serialized_bytes(m) for m in own)
    assert counted[records.PENDING, "uplink"] > strategy.served.text_bytes


def test_flowers_own_loop_drives_it_too(config: RunConfig, edge_grid: Fixture) -> None:
    grid = edge_grid(2)
    strategy = strategy_on(config, grid, Server())
    result = Strategy.start(strategy, grid, ArrayRecord(), num_rounds=2)
    own = strategy_on(config, edge_grid(2), Server())
    assert own.serve(own.hosting.grid) == strategy.served
    assert result.evaluate_metrics_clientapp[2]["queries"] == 40


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (records.PENDING, {"deferred": [[0, "x"], [0, "y"]]}, "each place once"),
        (records.PENDING, {"queries": "many"}, "queries: expected a whole number"),
        (records.PENDING, {"input-tokens": -1}, "expected counts >= 0"),
        (records.PENDING, {"deferred": [[0, "\ud800"]]}, "half of a surrogate pair"),
        (records.PENDING, {"error": "broken"}, "broken"),
        (records.ANSWERS, {"queries": 10**9}, "expected counts of"),
        (records.ANSWERS, {"deferred-correct": 1, "correct": 0}, "expected counts of"),
        (records.ANSWERS, {"deferred": 99}, "expected counts of"),
        (records.ANSWERS, {"correct": 99}, "expected counts of"),
        (records.ANSWERS, {"correct": 1.5}, "correct: expected 1 counts"),
    ],
)
def test_a_client_that_says_what_cannot_be_is_left_out(
    kind: str, change: dict[str, Any], reason: str, config: RunConfig, edge_grid: Fixture
) -> None:
    def tamper(asked: list[Message], replies: list[Message]) -> list[Message]:
        by_id = {message.metadata.message_id: message for message in asked}
        found = []
        for reply in replies:
            question = by_id[reply.metadata.reply_to_message_id]
            if question.metadata.message_type == kind:
                body, _ = records.read(reply, records.ANSWER)
                for info in body["clients"]:
                    info |= change if info["partition-id"] == 1 else {}
                reply = Message(records.answer(body, {}, "float32", 0), reply_to=question)
            found.append(reply)
        return found

    grid = edge_grid(2, tamper)
    strategy = strategy_on(config, grid, Server())
    served = strategy.serve(grid)
    ((client, why),) = strategy.account.failures  # type: ignore[attr-defined]
    assert client == 1
    assert reason in why
    assert served.clients == 3


@pytest.mark.parametrize(
    ("deferred", "reason"),
    [
        (None, "expected a list"),
        ([["0", "x"]], "places and texts"),
        ([[0]], "places and texts"),
        ([[True, "x"]], "places and texts"),
        ([[5, "x"]], "places and texts"),
        ([[0, None]], "places and texts"),
        ([[0, "x" * 100_001]], "at most 100000 characters"),
    ],
)
def test_malformed_texts_are_refused(deferred: Any, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        checked_texts("client 0", deferred, 5)
    assert checked_texts("client 0", [[3, "b"], [1, "a"]], 5) == [(1, "a"), (3, "b")]
