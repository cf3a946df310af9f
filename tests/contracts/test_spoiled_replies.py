"""A reply that is wrong in any way is dropped and named, counts for nothing, and the round goes on."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.runs import checkpoints

Fixture = Callable[..., Any]
Infos = list[dict[str, Any]]
Parts = dict[str, np.ndarray]
VICTIM = 1
"""Hosted alone, on the second of four nodes."""
MINE = f"{VICTIM}/adapter"


def error_reply(asked: Message, infos: Infos, parts: Parts) -> Message:
    return Message(Error(2, "Traceback ...\nOutOfMemoryError: 5 GiB"), reply_to=asked)


def undecodable(asked: Message, infos: Infos, parts: Parts) -> Message:
    content = records.answer({"clients": infos}, parts, "float32", 1)
    content[records.ANSWER]["parts"] = '[["1/adapter", 3]]'
    return Message(content, reply_to=asked)


def another_version(asked: Message, infos: Infos, parts: Parts) -> Message:
    content = records.answer({"clients": infos}, parts, "float32", 1)
    content[records.ANSWER]["package-version"] = "9.9.9"
    return Message(content, reply_to=asked)


def no_record(asked: Message, infos: Infos, parts: Parts) -> Message:
    content = records.answer({}, {}, "float32", 1)
    content["hello"] = ConfigRecord()
    del content[records.ANSWER]
    return Message(content, reply_to=asked)


def not_finite(asked: Message, infos: Infos, parts: Parts) -> None:
    parts[MINE][-1] = np.nan


def infinite(asked: Message, infos: Infos, parts: Parts) -> None:
    parts[MINE][0] = -np.inf


def too_short(asked: Message, infos: Infos, parts: Parts) -> None:
    parts[MINE] = parts[MINE][:-1]


def no_adapter(asked: Message, infos: Infos, parts: Parts) -> None:
    del parts[MINE]


def another_part(asked: Message, infos: Infos, parts: Parts) -> None:
    parts[f"{VICTIM}/rows"] = np.ones(3, np.float32)


def strange_name(asked: Message, infos: Infos, parts: Parts) -> None:
    parts["--1/²"] = parts.pop(MINE)


def silent_about_itself(asked: Message, infos: Infos, parts: Parts) -> None:
    infos.clear()


def not_a_client(asked: Message, infos: Infos, parts: Parts) -> None:
    infos[0] = 5  # type: ignore[call-overload]


def saying(name: str, value: Any) -> Callable[..., None]:
    def change(asked: Message, infos: Infos, parts: Parts) -> None:
        infos[0][name] = value
        if value is None:
            del infos[0][name]

    return change


FAULTS: dict[str, tuple[Callable[..., Message | None], str]] = {
    "error reply": (error_reply, "error 2: OutOfMemoryError: 5 GiB"),
    "undecodable": (undecodable, r"unreadable reply: .* claim 3 values, the array holds \d+"),
    "another version": (another_version, r"this side runs 0\.\S+, the other side 9\.9\.9"),
    "no record": (no_record, r"expected a record 'answer', got \['hello', 'metrics'\]"),
    "not finite": (
        not_finite,
        r"client 1, layer model\.layers\.1\.self_attn\.v_proj: expected finite values, got nan",
    ),
    "infinite": (
        infinite,
        r"client 1, layer model\.layers\.0\.self_attn\.q_proj: expected finite values, got -inf",
    ),
    "wrong shape": (
        too_short,
        r"client 1: expected \d+ values \(rank \d, side (both|a|b)\), got \d+",
    ),
    "no adapter": (no_adapter, r"client 1: expected one part 'adapter', got \[\]"),
    "another part": (another_part, r"expected one part 'adapter', got \['adapter', 'rows'\]"),
    "a part of a strange name": (strange_name, r"client 1: expected one part 'adapter', got \[\]"),
    "no answer for the client": (silent_about_itself, "no reply"),
    "an answer that is no object": (not_a_client, "unreadable reply"),
    "its own error": (saying("error", "client 1: no usable rows"), "client 1: no usable rows"),
    "no examples": (saying("num-examples", 0), "client 1: weight: expected .* above 0 .*, got 0"),
    "endless examples": (saying("num-examples", math.inf), "num-examples: expected a whole number, got inf"),
    "huge examples": (saying("num-examples", 10**400), "num-examples: expected a whole number, got 1000"),
    "half an example": (saying("num-examples", 0.5), "num-examples: expected a whole number, got 0.5"),
    "steps are missing": (saying("steps", None), "client 1: steps: expected a whole number, got None"),
    "tokens are text": (saying("tokens", "many"), "client 1: tokens: expected a whole number, got 'many'"),
    "loss is no number": (saying("loss", math.nan), "client 1: loss: expected a finite number, got nan"),
}  # fmt: skip
CHOSEN = [("factor_mean", fault) for fault in FAULTS]
CHOSEN += [
    (which, fault)
    for which in ("stack", "residual_mixed", "svd", "b_only_mixed", "alternating_mixed", "fedadam")
    for fault in ("error reply", "wrong shape", "steps are missing")
]


@pytest.fixture(scope="module")
def without_victim(configured: Fixture, play: Fixture, edge_grid: Fixture) -> Callable[[str], Any]:
    """One round of a case in which the victim's node never answers."""
    found: dict[str, Any] = {}

    def silent(asked: list[Message], replies: list[Message]) -> list[Message]:
        both = zip(asked, replies, strict=True)
        return [r for m, r in both if VICTIM not in records.read_body(m).get("partition-ids", [])]

    def played(which: str) -> Any:
        if which not in found:
            config = configured(which, "num_rounds=1", "runtime.num_nodes=4")
            found[which] = play(config, grid=edge_grid(4, silent))
        return found[which]

    return played


@pytest.mark.parametrize(("which", "fault"), CHOSEN)
def test_a_bad_reply_is_dropped_and_named_and_the_round_goes_on(
    which: str,
    fault: str,
    configured: Fixture,
    play: Fixture,
    edge_grid: Fixture,
    spoil: Fixture,
    without_victim: Fixture,
    remembering: Any,
) -> None:
    change, reason = FAULTS[fault]

    def spoiled(asked: Message, infos: Infos, parts: Parts) -> Message | None:
        return change(asked, infos, parts) if MINE in parts else None

    config = configured(which, "num_rounds=1", "runtime.num_nodes=4")
    played = play(config, grid=edge_grid(4, spoil(spoiled), remembering))
    (failure,) = played.run.records("failure")
    assert (failure["round"], failure["partition_id"]) == (1, VICTIM)
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert "\n" not in failure["reason"]
    assert played.sha == without_victim(which).sha
    assert [c["partition_id"] for c in played.run.records("client")] == [0, 2, 3]
    assert played.run.records("round")[-1]["dropped_replies"] == 1


def test_a_client_that_was_not_asked_is_named_and_counts_for_nothing(
    undisturbed: Fixture, configured: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    def intrude(asked: Message, infos: Infos, parts: Parts) -> None:
        if infos[0]["partition-id"] == VICTIM:
            for stranger in (2, 77):
                infos.append(infos[0] | {"partition-id": stranger, "num-examples": 1000})
                parts[f"{stranger}/adapter"] = parts[MINE] + 1

    config = configured("factor_mean", "runtime.num_nodes=4")
    played = play(config, grid=edge_grid(4, spoil(intrude, rounds=[2])))
    assert played.sha == undisturbed("factor_mean").sha
    failures = [(f["round"], f["partition_id"]) for f in played.run.records("failure")]
    assert failures == [(2, 2), (2, 77)]
    assert "expected answers of clients [1]" in played.run.records("failure")[0]["reason"]


def test_a_second_answer_is_named_and_counts_for_nothing(
    undisturbed: Fixture, configured: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    twice = edge_grid(2, lambda asked, replies: [*replies, replies[-1]])
    config = configured("stack")
    played = play(config, grid=twice)
    assert played.sha == undisturbed("stack").sha
    assert {f["partition_id"] for f in played.run.records("failure")} == {1, 3}
    assert all("another one" in f["reason"] for f in played.run.records("failure"))


EVALUATIONS = {
    "no splits": (lambda info: info.pop("splits"), "expected the splits validation, test, got None"),
    "one split": (lambda info: info["splits"].pop("test"), "expected the splits validation, test"),
    "no sums": (lambda info: info["splits"].update(test=3), "expected the splits validation, test"),
    "a sum is missing": (
        lambda info: info["splits"]["test"].pop("total"),
        "client 1: total: expected a whole number, got None",
    ),
    "more right than there are": (
        lambda info: info["splits"]["test"].update(correct=10**6),
        "client 1: expected sums >= 0 and no more correct than total rows and label tokens",
    ),
    "a sum is no number": (
        lambda info: info["splits"]["test"].update(loss_sum=math.nan),
        "client 1: loss_sum: expected a finite number, got nan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", EVALUATIONS)
def test_a_bad_evaluation_is_dropped_and_named(
    fault: str,
    configured: Fixture,
    play: Fixture,
    edge_grid: Fixture,
    remembering: Any,
) -> None:
    change, reason = EVALUATIONS[fault]

    def spoil_evaluation(asked: list[Message], replies: list[Message]) -> list[Message]:
        for reply in replies:
            if reply.metadata.message_type == records.EVALUATE:
                body, _ = records.read(reply, records.ANSWER)
                if body["clients"][0]["partition-id"] == VICTIM:
                    change(body["clients"][0])
                    reply.content = records.answer(body, {}, "float32", 1)
        return replies

    config = configured("factor_mean", "num_rounds=1", "runtime.num_nodes=4")
    grid = edge_grid(4, spoil_evaluation, remembering)
    played = play(config, grid=grid, splits=("validation", "test"))
    failures = played.run.records("failure")
    assert {(f["round"], f["partition_id"]) for f in failures} == {(0, VICTIM), (1, VICTIM)}
    assert all(f["reason"].startswith("evaluation: ") for f in failures)
    assert all(reason in f["reason"] for f in failures)
    seen = {e["partition_id"] for e in played.run.records("evaluation")}
    assert seen == {0, 2, 3}


# Giving up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which", ["factor_mean", "stack_mixed", "svd", "alternating_mixed", "fedadam"]
)
def test_too_few_good_replies_stop_the_run_and_it_can_go_on(
    which: str,
    configured: Fixture,
    play: Fixture,
    undisturbed: Fixture,
    edge_grid: Fixture,
    spoil: Fixture,
    tmp_path: Any,
) -> None:
    config = configured(which, "strategy.min_fraction=0.75")
    expected = "round 2: 2 of 4 clients gave a good reply .* asks for 3"

    def second_node(asked: Message, infos: Infos, parts: Parts) -> Message | None:
        return error_reply(asked, infos, parts) if MINE in parts else None

    with pytest.raises(RunStoppedError, match=expected):
        play(config, grid=edge_grid(2, spoil(second_node, rounds=[2])), folder=tmp_path / "run")
    saved = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.server_round == 1
    assert play(config, folder=tmp_path / "run").sha == undisturbed(which).sha


def test_a_retry_asks_only_those_that_failed_and_each_counts_once(
    configured: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    retrying = ("num_rounds=2", "strategy.max_retries=2", "strategy.min_fraction=1.0")
    config = configured("stack", *retrying)
    undisturbed = play(config)
    left = {2: 2}  # round -> how often the second node still fails

    def fails_twice(asked: Message, infos: Infos, parts: Parts) -> Message | None:
        server_round = records.read_body(asked)["server-round"]
        if MINE not in parts or not left.get(server_round):
            return None
        left[server_round] -= 1
        return error_reply(asked, infos, parts)

    grid = edge_grid(2, spoil(fails_twice))
    played = play(config, grid=grid)
    bodies = [records.read_body(m) for m in grid.sent if m.metadata.message_type == records.TRAIN]
    asked = [body["partition-ids"] for body in bodies if body["server-round"] == 2]
    assert asked == [[0, 2], [1, 3], [1, 3], [1, 3]]
    clients = [c["partition_id"] for c in played.run.records("client") if c["round"] == 2]
    assert sorted(clients) == [0, 1, 2, 3]
    for layer in played.strategy.model.delta:
        # The clients that came late are added last: another order of a float64 sum, rounded to float32 once.
        np.testing.assert_allclose(
            played.product(layer), undisturbed.product(layer), rtol=0, atol=1e-6
        )


def test_a_dead_worker_stops_the_run_at_once(
    configured: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture, tmp_path: Any
) -> None:
    def died(asked: Message, infos: Infos, parts: Parts) -> Message | None:
        return Message(Error(0, "ActorDied"), reply_to=asked) if MINE in parts else None

    config = configured("factor_mean", "num_rounds=2", "strategy.max_retries=5")
    grid = edge_grid(2, spoil(died, rounds=[2]))
    with pytest.raises(RunStoppedError, match=r"worker died \(ActorDied\); resume the run"):
        play(config, grid=grid, folder=tmp_path / "run")
    assert len([m for m in grid.sent if m.metadata.message_type == records.TRAIN]) == 4
    saved = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.server_round == 1


def test_a_failed_round_under_flowers_own_loop_does_not_spoil_the_next(
    configured: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    def second_node(asked: Message, infos: Infos, parts: Parts) -> Message | None:
        return error_reply(asked, infos, parts) if MINE in parts else None

    config = configured("factor_mean", "strategy.min_fraction=0.75")
    grid = edge_grid(2, spoil(second_node, rounds=[2]))
    played = play(config, grid=grid, flower=True)
    assert sorted(played.result.train_metrics_clientapp) == [1, 3]
    third = [c["partition_id"] for c in played.run.records("client") if c["round"] == 3]
    assert third == [0, 1, 2, 3]
