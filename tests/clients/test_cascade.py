import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from clients import workspace
from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.tiers import Computing, LocalMember, Tier, pack_tier, tier_histogram

Fixture = Callable[..., Any]
NODE = 1000


@pytest.fixture(scope="module")
def sampled() -> Tier:
    """Samples of the tiny model, which agree on some rows and on others not."""
    member = LocalMember("tiny", ModelRef("tiny"), max_tokens=48, computing=Computing("float32", "cpu"))  # fmt: skip
    config = TierConfig(name="small", members=(MemberConfig(model="tiny"),), kind="self_consistency",
                        samples=3, temperature=0.7)  # fmt: skip
    return Tier(config, (member,), seed=1)


@pytest.fixture
def config(micro: Fixture) -> RunConfig:
    found: RunConfig = micro()
    return found


def asked(config: RunConfig, tier: Tier | None, kind: str, **body: Any) -> Message:
    """A message to client 0, as a strategy sends it."""
    settings, parts = pack_tier(tier) if tier else ({}, {})
    common = {"config": json.loads(config.to_json()), "fingerprint": config.fingerprint(), "run": "r",
              "partition-ids": [0], "cascade": settings}  # fmt: skip
    return Message(records.instruction({**common, **body}, parts, "float32"), NODE, kind)


def said(grid: Any, message: Message) -> dict[str, Any]:
    (reply,) = grid.send_and_receive([message])
    assert reply.has_content(), reply.error.reason
    (info,) = records.read(reply, records.ANSWER)[0]["clients"]
    found: dict[str, Any] = info
    return found


def work_of(config: RunConfig) -> workspace.Workspace:
    return workspace.open_workspace(json.dumps(json.loads(config.to_json()) | {"out_dir": ""}))


def test_calibration_says_counts_of_the_clients_validation_rows_and_nothing_else(
    config: RunConfig, sampled: Tier, edge_grid: Fixture
) -> None:
    info = said(edge_grid(1), asked(config, sampled, records.CALIBRATE))
    work = work_of(config)
    wanted = tier_histogram(sampled, work.task, work.rows(0).validation)
    assert info == {
        "partition-id": 0,
        "correct": wanted.correct.tolist(),
        "total": wanted.total.tolist(),
    }
    assert sum(info["total"]) == len(work.rows(0).validation)


@pytest.mark.parametrize("theta", [0.0, 1.0, 2.0])
def test_queries_below_the_threshold_are_deferred_by_text(
    theta: float, config: RunConfig, sampled: Tier, edge_grid: Fixture
) -> None:
    info = said(edge_grid(1), asked(config, sampled, records.PENDING, theta=theta))
    rows = work_of(config).rows(0).test
    assert info["queries"] == len(rows)
    assert all(rows[place].text == text for place, text in info["deferred"])
    assert (len(info["deferred"]) == 0) == (theta == 0.0)
    assert (len(info["deferred"]) == len(rows)) == (theta == 2.0)
    assert info["output-tokens"] == 3 * len(rows)


def test_answers_come_together_at_the_client(
    config: RunConfig, sampled: Tier, edge_grid: Fixture, tmp_path: Path
) -> None:
    grid = edge_grid(1, node_config={"state-path": str(tmp_path)})
    rows = work_of(config).rows(0).test
    info = said(grid, asked(config, sampled, records.PENDING, theta=1.0))
    places = [place for place, _ in info["deferred"]]
    given = [[place, rows[place].target] for place in places]
    found = said(grid, asked(config, None, records.ANSWERS, answers=given))
    lines = [
        json.loads(line)
        for line in (tmp_path / "answers" / "client-0.jsonl").read_text().splitlines()
    ]
    assert [line["query"] for line in lines] == [row.row_id for row in rows]
    assert [n for n, line in enumerate(lines) if line["deferred"]] == places
    right = [line["answer"] == row.target for line, row in zip(lines, rows, strict=True)]
    assert found == {"partition-id": 0, "queries": len(rows), "correct": sum(right),
                     "deferred": len(places), "deferred-correct": len(places)}  # fmt: skip
    again = said(grid, asked(config, None, records.ANSWERS, answers=given))
    assert "expected to have answered its queries before" in again["error"], "answers come once"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"answers": []}, "expected answers to its .* deferred queries, got 0"),
        ({"answers": [], "run": "other"}, "expected to have answered its queries before"),
    ],
)
def test_answers_to_other_queries_are_refused(
    body: dict[str, Any], message: str, config: RunConfig, sampled: Tier, edge_grid: Fixture
) -> None:
    grid = edge_grid(1)
    said(grid, asked(config, sampled, records.PENDING, theta=2.0))
    found = said(grid, asked(config, None, records.ANSWERS, **body))
    assert re.search(message, found["error"])


def test_a_client_that_fails_says_neither_rows_nor_paths(
    config: RunConfig, sampled: Tier, edge_grid: Fixture
) -> None:
    message = asked(config, sampled, records.CALIBRATE)
    body = records.read_body(message)
    body["cascade"]["members"][0]["template"] = "absent"
    message = Message(records.instruction(body, {}, "float32"), NODE, records.CALIBRATE)
    error = said(edge_grid(1), message)["error"]
    assert error == "client 0: calibration failed (ConfigError); the node's log says why"
