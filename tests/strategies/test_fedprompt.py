from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import records
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.models.prompt_start import prompt_width
from strategies.exchange import ClientReply
from strategies.fedprompt import CLUSTER, START, first_parts

Fixture = Callable[..., Any]
PROMPT = "method=fedprompt"
FIGURES = {"num-examples": 4, "loss": 1.0, "steps": 2, "tokens": 10, "cpu-seconds": 0.1}


@pytest.fixture
def strategy(micro: Fixture, play: Fixture) -> Callable[..., Any]:
    """A strategy before its first round: a run of one round, then its parts set back to the start."""

    def make(*overrides: str) -> Any:
        made = play(micro(PROMPT, *overrides, "num_rounds=1")).strategy
        made.parts = {"shared": first_parts(made.config)["shared"]}
        made.clusters, made._moments = {}, None
        made.begin_sum(1)
        return made

    return make


def reply(client: int, shared: np.ndarray, examples: int = 4, **more: Any) -> ClientReply:
    parts = {"shared": shared.astype(np.float32)}
    if "cluster" in more:
        parts["cluster"] = more.pop("values").astype(np.float32)
    return ClientReply(client, FIGURES | {"num-examples": examples} | more, parts)


def random(strategy: Any, seed: int, part: str = "shared") -> np.ndarray:
    size = strategy.parts["shared"].size if part == "shared" else strategy._cluster_start.size
    return np.random.default_rng(seed).normal(size=size)


def test_a_prompt_is_four_bytes_a_value_up_and_down(micro: Fixture, play: Fixture) -> None:
    played = play(micro(PROMPT, "num_rounds=1", "runtime.num_nodes=4", "method.length=5"))
    width = prompt_width(played.strategy.config.model.ref(""))
    carrying = [m for m in (*played.grid.sent, *played.grid.replies) if "arrays" in m.content]
    assert len(carrying) == 8
    for message in carrying:
        assert message.content["arrays"]["flat"].numpy().nbytes == 4 * 5 * width


def test_the_mean_is_weighted_by_examples(strategy: Fixture) -> None:
    made = strategy()
    one, two = random(made, 1), random(made, 2)
    made.add_reply(reply(0, one, examples=1), 1)
    made.add_reply(reply(1, two, examples=3), 1)
    made.finish_sum(1)
    np.testing.assert_allclose(made.parts["shared"], (one + 3 * two) / 4, rtol=0, atol=1e-6)


def test_equal_weights_give_the_plain_mean(strategy: Fixture) -> None:
    made = strategy("strategy.weighting=uniform")
    values = [random(made, seed) for seed in range(3)]
    for client, value in enumerate(values):
        made.add_reply(reply(client, value, examples=1 + 7 * client), 1)
    made.finish_sum(1)
    np.testing.assert_allclose(made.parts["shared"], np.mean(values, axis=0), rtol=0, atol=1e-6)


def groups(loss: float, total: int = 4) -> dict[str, Any]:
    return {"all": {"loss_sum": loss * total, "correct": 1, "total": total}}


def test_q_ffl_with_q_0_is_the_mean_and_with_q_above_it_leans_to_high_losses(
    strategy: Fixture,
) -> None:
    made = {q: strategy("fairness=q_ffl", f"fairness.q={q}") for q in (0.0, 1.0)}
    start = made[0.0].parts["shared"].copy()
    one, two = start + random(made[0.0], 1) * 1e-3, start + random(made[0.0], 2) * 1e-3
    for strategy_ in made.values():
        strategy_.add_reply(reply(0, one, groups=groups(0.1)), 1)
        strategy_.add_reply(reply(1, two, groups=groups(5.0)), 1)
        strategy_.finish_sum(1)
    np.testing.assert_allclose(made[0.0].parts["shared"], (one + two) / 2, rtol=0, atol=1e-6)
    moved = made[1.0].parts["shared"] - start
    # one direction is almost orthogonal to the other: the step's share of each says whom it serves
    shares = [moved @ (one - start), moved @ (two - start)]
    assert shares[1] > 10 * abs(shares[0])


def test_clusters_average_among_themselves_and_share_the_suffix(strategy: Fixture) -> None:
    made = strategy("method.cluster_length=2")
    shared = [random(made, seed) for seed in range(3)]
    own = [random(made, 10 + seed, "cluster") for seed in range(3)]
    for client, name in enumerate(("de", "en", "de")):
        made.add_reply(reply(client, shared[client], cluster=name, values=own[client]), 1)
    made.finish_sum(1)
    np.testing.assert_allclose(made.parts["shared"], np.mean(shared, axis=0), atol=1e-6)
    np.testing.assert_allclose(made.parts[CLUSTER + "de"], (own[0] + own[2]) / 2, atol=1e-6)
    np.testing.assert_allclose(made.parts[CLUSTER + "en"], own[1], atol=1e-6)


def test_a_message_carries_only_its_clients_clusters_once_they_are_known(strategy: Fixture) -> None:
    made = strategy("method.cluster_length=2")
    for client, name in enumerate(("de", "en")):
        sent = reply(client, random(made, client), cluster=name, values=random(made, 3, "cluster"))
        made.add_reply(sent, 1)
    made.finish_sum(1)
    _, parts = made.broadcast(2, train=True)
    assert set(parts) == {"shared", START, CLUSTER + "de", CLUSTER + "en"}
    assert set(made.parts_for([0], parts)) == {"shared", CLUSTER + "de"}
    assert set(made.parts_for([0, 1], parts)) == {"shared", CLUSTER + "de", CLUSTER + "en"}
    assert set(made.parts_for([0, 7], parts)) == set(parts), "nobody knows where client 7 belongs"


def test_moments_of_a_cluster_that_rests_are_kept(strategy: Fixture) -> None:
    made = strategy("method.cluster_length=2", "strategy.server_optimizer=fedavgm")
    for server_round, name in enumerate(("de", "en", "de"), start=1):
        made.begin_sum(server_round)
        values = random(made, server_round, "cluster")
        made.add_reply(reply(0, random(made, 9), cluster=name, values=values), server_round)
        made.finish_sum(server_round)
        saved = made.checkpoint(server_round)
        made.restore(saved)
    moments = made.checkpoint(3).arrays
    assert {n for n in moments if n.startswith("optimizer/momentum/")} == {
        "optimizer/momentum/shared", "optimizer/momentum/cluster/de", "optimizer/momentum/cluster/en",
    }  # fmt: skip


def spoiled(**changes: Any) -> Callable[[Any], ClientReply]:
    def make(made: Any) -> ClientReply:
        good = reply(1, random(made, 1))
        info = {**good.info, **changes.get("info", {})}
        return ClientReply(1, info, changes.get("parts", lambda p: p)(dict(good.parts)))

    return make


BAD = {
    "another part": (spoiled(parts=lambda p: p | {"rows": np.ones(3, np.float32)}), WireError,
                     r"client 1: expected the parts \['shared'\], got \['rows', 'shared'\]"),
    "no part": (spoiled(parts=lambda p: {}), WireError, r"expected the parts \['shared'\], got \[\]"),
    "another size": (spoiled(parts=lambda p: {"shared": p["shared"][1:]}), ShapeError,
                     r"client 1, part shared: expected \d+ values, got \d+"),
    "not finite": (spoiled(parts=lambda p: {"shared": p["shared"] * np.nan}), WireError,
                   "client 1, part shared: expected finite values"),
    "no examples": (spoiled(info={"num-examples": 0}), WireError, "client 1: weight: expected"),
    "no loss": (spoiled(info={"loss": None}), WireError, "client 1: loss: expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_refused_and_counts_for_nothing(fault: str, strategy: Fixture) -> None:
    make, error, match = BAD[fault]
    made = strategy()
    good = random(made, 5)
    made.add_reply(reply(0, good), 1)
    with pytest.raises(error, match=match):
        made.add_reply(make(made), 1)
    made.finish_sum(1)
    np.testing.assert_allclose(made.parts["shared"], good, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [None, "", 3, "x" * 65])
def test_a_client_must_name_its_cluster(name: Any, strategy: Fixture) -> None:
    made = strategy("method.cluster_length=2")
    values = random(made, 1, "cluster")
    with pytest.raises(WireError, match="client 0: expected the name of its cluster"):
        made.add_reply(reply(0, random(made, 1), cluster=name, values=values), 1)
    assert not made._sums


def test_a_checkpoint_of_another_prompt_is_refused(strategy: Fixture) -> None:
    short, long = strategy(), strategy("method.length=4")
    with pytest.raises(ShapeError, match="expected a prompt of"):
        long.restore(short.checkpoint(1))


def test_prompts_that_begin_apart_average_to_less(micro: Fixture, play: Fixture) -> None:
    """Position by position, a mean of prompts from several starts is a mean of strangers: it shrinks."""
    sizes = {}
    for common in ("true", "false"):
        config = micro(
            PROMPT, f"method.common_start={common}", "num_rounds=1", "method.start=random"
        )
        played = play(config)
        own = [
            part
            for r in played.grid.replies
            if r.metadata.message_type == records.TRAIN
            for part in records.read(r, records.ANSWER)[1].values()
        ]
        mean_norm = np.mean([np.linalg.norm(part) for part in own])
        sizes[common] = np.linalg.norm(played.strategy.parts["shared"]) / mean_norm
    assert sizes["true"] > 0.95
    assert sizes["false"] < 0.8


def test_q_ffl_takes_a_clients_loss_over_all_of_its_groups(strategy: Fixture) -> None:
    split, whole = strategy("fairness=q_ffl"), strategy("fairness=q_ffl")
    value = random(split, 1)
    two = {
        "a": {"loss_sum": 1.0, "correct": 0, "total": 1},
        "b": {"loss_sum": 3.0, "correct": 0, "total": 3},
    }
    split.add_reply(reply(0, value, groups=two), 1)
    whole.add_reply(reply(0, value, groups=groups(1.0)), 1)
    for made in (split, whole):
        made.finish_sum(1)
    np.testing.assert_array_equal(split.parts["shared"], whole.parts["shared"])


def test_a_client_counts_by_what_its_groups_weigh(strategy: Fixture) -> None:
    made = strategy("fairness=agnostic")
    made.balance.restore(
        {"multipliers": {"a": 0.75, "b": 0.25}, "counts": {"0": {"a": 4}, "1": {"b": 4}}}
    )
    made.balance.begin()
    one, two = random(made, 1), random(made, 2)
    for client, name, value in ((0, "a", one), (1, "b", two)):
        made.add_reply(
            reply(client, value, groups={name: {"loss_sum": 4.0, "correct": 0, "total": 4}}), 1
        )
    made.finish_sum(1)
    np.testing.assert_allclose(made.parts["shared"], 0.75 * one + 0.25 * two, rtol=0, atol=1e-5)


def test_a_personal_prompt_that_is_lost_is_said(micro: Fixture, play: Fixture) -> None:
    played = play(micro(PROMPT, "method.personal_length=2", "num_rounds=1"))
    made = played.strategy
    for known in ("kept", "new"):
        made.begin_sum(2)
        made.add_reply(reply(0, random(made, 1), personal=known), 2)
    said = [e["text"] for e in played.run.records("event") if "personal" in e["text"]]
    assert len(said) == 1
    assert said[0].startswith("client 0 has lost its personal prompt")


def test_an_evaluation_without_its_cluster_is_named_and_the_run_goes_on(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    def forgetful(asked: list[Any], replies: list[Any]) -> list[Any]:
        for one in replies:
            if one.metadata.message_type == records.EVALUATE:
                body, _ = records.read(one, records.ANSWER)
                body["clients"][0].pop("cluster")
                one.content = records.answer(body, {}, "float32", 1)
        return replies

    config = micro(PROMPT, "method.cluster_length=2", "num_rounds=1", "runtime.num_nodes=4")
    played = play(config, grid=edge_grid(4, forgetful), splits=("test",))
    failures = [f["reason"] for f in played.run.records("failure")]
    assert len(failures) == 2 * 4
    assert all("expected the name of its cluster, got None" in reason for reason in failures)
    assert set(played.strategy.clusters) == {0, 1, 2, 3}, "learned from their training's replies"
