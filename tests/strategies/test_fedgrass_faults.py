"""Replies that a client spoils cost that client the round and nobody else anything."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm_flwr import records
from fedllm_flwr.grass.packing import bitmap, indices_of

Fixture = Callable[..., Any]
VICTIM = 1


def change_rows(key: str, value: Any) -> Callable[..., None]:
    def change(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        first = sorted(infos[0]["rows"])[0]
        infos[0]["rows"][first] = value(infos[0]["rows"][first]) if callable(value) else value
        if key == "drop":
            infos[0]["rows"].pop(first)

    return change


def in_part(place: int, value: float) -> Callable[..., None]:
    def change(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        parts[f"{VICTIM}/rows"][place] = value

    return change


def shorter(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
    parts[f"{VICTIM}/rows"] = parts[f"{VICTIM}/rows"][:-1]


def saying(name: str, value: Any) -> Callable[..., None]:
    return lambda infos, parts: infos[0].update({name: value})


def one_more_row(text: str) -> str:
    rows = indices_of(text, 64, "test")
    other = np.setdiff1d(np.arange(64), rows)[0]
    return bitmap(np.append(rows, other), 64)


def one_row_less(text: str) -> str:
    return bitmap(indices_of(text, 64, "test")[1:], 64)


LOCAL_FAULTS = {
    "no bitmap": (change_rows("set", "§§"), r"client 1, layer model\S+q_proj: expected a bitmap of 64 rows, got '§§'"),
    "a number": (change_rows("set", 7), "expected a bitmap of 64 rows, got 7"),
    "too few rows": (change_rows("set", bitmap(np.arange(4), 8)), "expected a bitmap of 64 rows, got 8 bits"),
    "rows beyond the matrix": (change_rows("set", bitmap(np.array([70]), 72)), "64 rows, got 72 bits"),
    "values without a row": (change_rows("set", one_row_less), r"part rows: expected \d+ values, got \d+"),
    "more rows than it could train": (
        change_rows("set", one_more_row), r"client 1, layer model\S+q_proj: expected at most 4 rows of 2 steps, got 5"
    ),
    "a layer is missing": (change_rows("drop", ""), "client 1, rows: expected those of 4 layers"),
    "no rows": (saying("rows", None), "client 1, rows: expected those of 4 layers, got None"),
}  # fmt: skip
FAULTS = {
    "not finite": (in_part(0, math.nan), "client 1, part rows: expected finite values"),
    "infinite": (in_part(-1, math.inf), "client 1, part rows: expected finite values"),
    "too short": (shorter, r"client 1, part rows: expected \d+ values, got \d+"),
    "no examples": (saying("num-examples", 0), "client 1: weight: expected .* above 0"),
    "loss is no number": (saying("loss", math.nan), "client 1: loss: expected a finite number"),
    "its own error": (saying("error", "client 1: no rows"), "client 1: no rows"),
}


def spoiling(edge_grid: Fixture, change: Callable[..., None], stage: str) -> Any:
    """Four nodes; the victim's replies of one stage are changed."""

    def tamper(asked: list[Message], replies: list[Message]) -> list[Message]:
        for message in asked:
            body = records.read_body(message)
            if body.get("stage") != stage or body["partition-ids"] != [VICTIM]:
                continue
            wanted = message.metadata.message_id
            [reply] = [r for r in replies if r.metadata.reply_to_message_id == wanted]
            told, parts = records.read(reply, records.ANSWER)
            parts = {name: values.copy() for name, values in parts.items()}
            change(told["clients"], parts)
            reply.content = records.answer(told, parts, "float32", 1)
        return replies

    return edge_grid(4, tamper)


@pytest.mark.parametrize(
    ("sharing", "fault"),
    [*(("shared", f) for f in FAULTS), *(("local", f) for f in LOCAL_FAULTS | {"too short": ()})],
)
def test_a_bad_reply_is_dropped_and_named_and_counts_for_nothing(
    sharing: str, fault: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    change, reason = (LOCAL_FAULTS | FAULTS)[fault]
    config = micro(
        "method=fedgrass",
        f"method.sharing={sharing}",
        "num_rounds=1",
        "evaluate_every=1",
        "runtime.num_nodes=4",
    )
    played = play(config, grid=spoiling(edge_grid, change, "train"))
    (failure,) = played.run.records("failure")
    assert (failure["round"], failure["partition_id"]) == (1, VICTIM)
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert [c["partition_id"] for c in played.run.records("client")] == [0, 2, 3]
    assert all(np.isfinite(update.values).all() for update in played.strategy.changed.values())


NORM_FAULTS = {
    "negative": (lambda infos, parts: parts["1/norms"].__setitem__(0, -1.0), "squared norms >= 0, got -1"),
    "not finite": (lambda infos, parts: parts["1/norms"].__setitem__(0, math.nan), "expected finite values"),
    "too few": (lambda infos, parts: parts.update({"1/norms": np.ones(3, np.float32)}), "values, got 3"),
    "absent": (lambda infos, parts: parts.clear(), r"expected the parts \['norms'\], got \[\]"),
    "no examples": (saying("num-examples", -1), "client 1: weight: expected .* above 0"),
    "its own error": (saying("error", "client 1: broken"), "client 1: broken"),
}  # fmt: skip


@pytest.mark.parametrize("fault", NORM_FAULTS)
def test_bad_norms_cost_their_client_the_round_and_no_one_else(
    fault: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    change, reason = NORM_FAULTS[fault]
    config = micro("method=fedgrass", "num_rounds=1", "evaluate_every=1", "runtime.num_nodes=4")
    played = play(config, grid=spoiling(edge_grid, change, "norms"))
    (failure,) = played.run.records("failure")
    assert failure["partition_id"] == VICTIM
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert [c["partition_id"] for c in played.run.records("client")] == [0, 2, 3]


def test_a_client_whose_norms_failed_is_asked_again_with_the_rows_of_the_round(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    config = micro(
        "method=fedgrass", "num_rounds=1", "evaluate_every=1", "runtime.num_nodes=4", "strategy.max_retries=1",
        "strategy.min_fraction=1.0",
    )  # fmt: skip
    left = [1]

    def once(infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        if left.pop(0) if left else 0:
            infos[0]["error"] = "client 1: broken"

    grid = spoiling(edge_grid, once, "norms")
    played = play(config, grid=grid)
    assert sorted(c["partition_id"] for c in played.run.records("client")) == [0, 1, 2, 3]
    assert played.run.records("failure")[0]["reason"] == "client 1: broken"
