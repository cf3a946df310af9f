"""The split method end to end: what is learned, what is averaged, and what a lost client does."""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from clients.contexts import contexts_of
from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.core import run, whole_json
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.evaluation import evaluate_run
from fedllm_flwr.preflight import preflight
from fedllm_flwr.reservoir import Controller
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.training.batches import plan_steps
from fedllm_flwr.training.settings import LocalSettings
from strategies.rounds import TooFewRepliesError

Fixture = Callable[..., Any]
METHOD = "method=fedresprompt"
MODES = ("fedavg_controller", "sync_sgd", "label_private", "private_controller")
LM = "method.server_model=lm"
TRAINING = (records.TRAIN, records.EXCHANGE)


def of(mode: str) -> str:
    return f"method.mode={mode}"


def test_a_client_that_keeps_its_labels_learns_what_others_learn(
    micro: Fixture, play: Fixture
) -> None:
    for model in ("surrogate", "lm"):
        values = [
            play(micro(METHOD, of(mode), f"method.server_model={model}")).strategy.controller
            for mode in ("fedavg_controller", "label_private")
        ]
        np.testing.assert_allclose(values[1], values[0], rtol=0, atol=2e-5)


def rows_of_first_step(config: Any) -> list[tuple[int, np.ndarray]]:
    """Each client's rows in its first step of round 1, by the planner that every method has."""
    work = open_workspace(whole_json(config))
    client = config.client
    settings = LocalSettings(
        batch_size=client.batch_size, local_steps=client.local_steps, local_epochs=1
    )
    found = []
    for own in work.clients:
        seed = derive_seed(config.seed, "client", own.partition_id, 1)
        [first, *_] = plan_steps(len(own.train), settings, seed)
        found.append((own.partition_id, np.concatenate(first)))
    return found


def joint_loss(played: Any, flat: torch.Tensor, chosen: Iterable[tuple[int, np.ndarray]]) -> Any:
    """The mean loss over rows of the whole graph, from the controller to the tiny model's own logits."""
    strategy, config = played.strategy, played.strategy.config
    work = open_workspace(whole_json(config))
    contexts = contexts_of(work)
    z = torch.cat([contexts.states(p, "train")[rows] for p, rows in chosen])
    labels = [work.rows(p).train[i].label for p, rows in chosen for i in rows]
    readout, lift = strategy.spec.split(flat)
    prompts = (z @ readout.T @ lift.T).view(len(z), strategy.spec.prompt_length, -1)
    backbone, words = strategy.server._model
    logits = backbone.model(inputs_embeds=prompts).logits[:, -1, list(words)]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels))


def test_one_synchronised_step_is_one_step_on_all_rows_together(
    micro: Fixture, play: Fixture
) -> None:
    """Split gradient = joint gradient through the frozen model, and mean over clients = pooled batch."""
    rate = 0.1
    config = micro(METHOD, of("sync_sgd"), LM, "num_rounds=1", "client.local_steps=1",
                   "optimizer=sgd", "client.batch_size=8",
                   f"optimizer.learning_rate={rate}", "client.clip_norm=0")  # fmt: skip
    played = play(config)
    spec = played.strategy.spec
    start = spec.start(derive_seed(config.seed, "controller")).requires_grad_()
    chosen = rows_of_first_step(config)
    assert len({len(rows) for _, rows in chosen}) > 1, "clients of different sizes: weights matter"
    loss = joint_loss(played, start, chosen)
    [gradient] = torch.autograd.grad(loss, start)
    wanted = (start - rate * gradient).detach().numpy()
    assert rate * np.abs(gradient.numpy()).max() > 1e-3
    np.testing.assert_allclose(played.strategy.controller, wanted, rtol=0, atol=1e-6)
    [record] = [r for r in played.run.records("round") if r["round"] == 1]
    clients = played.run.records("client")
    rows = {p: len(own) for p, own in chosen}
    mean = sum(c["loss"] * rows[c["partition_id"]] for c in clients) / sum(rows.values())
    assert mean == pytest.approx(loss.item(), abs=1e-6)
    assert math.isfinite(record["train_loss"])


def test_synchronised_training_is_pooled_training_over_many_steps(
    micro: Fixture, play: Fixture
) -> None:
    """Momentum and clipping are of the mean, and go on over rounds."""
    config = micro(METHOD, of("sync_sgd"), "num_rounds=2", "optimizer=sgd", "optimizer.momentum=0.9",
                   "optimizer.learning_rate=0.5", "client.clip_norm=0.05")  # fmt: skip
    played = play(config)
    strategy, work = played.strategy, open_workspace(whole_json(config))
    contexts, half = contexts_of(work), played.strategy.server._without_text
    pooled = Controller(strategy.spec, strategy.spec.start(derive_seed(config.seed, "controller")))
    optimizer = torch.optim.SGD([pooled.flat], lr=0.5, momentum=0.9)
    settings = LocalSettings(batch_size=4, local_steps=2)
    for server_round in (1, 2):
        plans = [
            list(plan_steps(len(own.train), settings,
                            derive_seed(config.seed, "client", own.partition_id, server_round)))
            for own in work.clients
        ]  # fmt: skip
        for step in range(2):
            chosen = [(p, np.concatenate(plan[step])) for p, plan in enumerate(plans)]
            z = torch.cat([contexts.states(p, "train")[rows] for p, rows in chosen])
            labels = [work.rows(p).train[i].label for p, rows in chosen for i in rows]
            b, prompts = pooled.prompts(z)
            _, slope = half.loss_and_gradient(prompts, torch.tensor(labels))
            gradient = pooled.gradient(z, b, slope)
            assert gradient.norm() > 0.05, "it is clipped"
            pooled.step(optimizer, gradient * (0.05 / (gradient.norm() + 1e-6)))
    np.testing.assert_allclose(strategy.controller, pooled.flat.data.numpy(), rtol=0, atol=1e-6)


def test_averaging_is_the_weighted_mean_of_clients_that_train_alone(
    micro: Fixture, play: Fixture
) -> None:
    config = micro(METHOD, LM, "num_rounds=1")
    played = play(config)
    total, weights = 0.0, 0
    for reply in played.grid.replies:
        if reply.metadata.message_type not in TRAINING:
            continue
        body, parts = records.read(reply, records.ANSWER)
        for info in body["clients"]:
            own = parts.get(f"{info['partition-id']}/controller")
            if own is not None:
                total = total + info["num-examples"] * own.astype(np.float64)
                weights += info["num-examples"]
    assert weights == 36
    np.testing.assert_allclose(played.strategy.controller, total / weights, rtol=0, atol=1e-7)


# Clients that fail -------------------------------------------------------------------------------------------------


def spoiling(
    change: Callable[[dict[str, Any], dict[str, np.ndarray], str], None],
    *,
    client: int = 1,
    stage: str = "",
    once: bool = False,
) -> Callable[[list[Message], list[Message]], list[Message]]:
    """Rewrite what one client answers in a stage of training; the first message has no stage."""
    done: list[int] = []

    def tamper(asked: list[Message], replies: list[Message]) -> list[Message]:
        by_id = {message.metadata.message_id: message for message in asked}
        return [rewritten(by_id[r.metadata.reply_to_message_id], r) for r in replies]

    def rewritten(asked: Message, reply: Message) -> Message:
        body = records.read_body(asked)
        if reply.metadata.message_type not in TRAINING or body.get("stage", "") != stage:
            return reply
        if client not in body["partition-ids"] or (once and done):
            return reply
        done.append(client)
        found, parts = records.read(reply, records.ANSWER)
        parts = {name: values.copy() for name, values in parts.items()}
        info = next(i for i in found["clients"] if i["partition-id"] == client)
        change(info, parts, f"{client}/")
        return Message(records.answer(found, parts, "float32", 1), reply_to=asked)

    return tamper


def set_info(name: str, value: Any) -> Callable[..., None]:
    return lambda info, parts, own: info.__setitem__(name, value)


def set_part(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    return lambda info, parts, own: parts.__setitem__(own + name, change(parts[own + name]))


BAD: dict[str, tuple[str, str, Callable[..., None], str]] = {
    "another reservoir": ("fedavg_controller", "", set_info("reservoir", "feed"),
                          r"client 1: expected reservoir [0-9a-f]{16}, got 'feed'"),
    "target outside": ("fedavg_controller", "", set_info("targets", [0, 1, 2, 4]),
                       r"client 1: expected targets in \[0, 4\), got 4"),
    "no targets": ("sync_sgd", "", set_info("targets", None), r"client 1: expected 4 targets, got None"),
    "another width": ("fedavg_controller", "", set_part("prompts", lambda p: p[:-1]),
                      r"client 1, part prompts: expected prompts of 2 tokens of width 64"),
    "prompts not finite": ("label_private", "", set_part("prompts", lambda p: p * np.nan),
                           r"client 1, part prompts: expected finite values"),
    "no rows": ("fedavg_controller", "", set_info("rows", None), r"client 1: rows: expected a whole number"),
    "slope of another size": ("label_private", "logits", set_part("slope", lambda p: p[1:]),
                              r"client 1, part slope: expected 16 values, got 15"),
    "gradient not finite": ("sync_sgd", "gradient", set_part("controller-gradient", lambda p: p * np.inf),
                            r"client 1, part controller-gradient: expected finite values"),
    "failed": ("private_controller", "gradient", set_info("error", "no memory"), "no memory"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_answer_drops_its_client_by_name_and_the_round_goes_on(
    fault: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    mode, stage, change, match = BAD[fault]
    grid = edge_grid(2, spoiling(change, stage=stage))
    played = play(micro(METHOD, of(mode), "num_rounds=1"), grid=grid)
    [failure] = played.run.records("failure")
    assert failure["partition_id"] == 1
    assert re.search(match, failure["reason"]), failure["reason"]
    [_, record] = played.run.records("round")
    assert record["dropped_replies"] == 1
    assert {c["partition_id"] for c in played.run.records("client")} == {0, 2, 3}
    assert np.isfinite(played.strategy.controller).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_round_that_fails_once_is_repeated_with_the_same_end(
    mode: str, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    overrides = (METHOD, of(mode), "strategy.min_fraction=1.0", "strategy.max_retries=1")
    usual = play(micro(*overrides))
    grid = edge_grid(2, spoiling(set_info("error", "lost"), stage="gradient", once=True))
    again = play(micro(*overrides), grid=grid)
    assert again.run.records("failure")
    assert again.sha == usual.sha


def test_too_few_clients_stop_the_run(micro: Fixture, play: Fixture, edge_grid: Fixture) -> None:
    for mode in ("sync_sgd", "fedavg_controller"):
        grid = edge_grid(2, spoiling(set_info("error", "lost"), stage="gradient"))
        with pytest.raises(TooFewRepliesError, match=r"round 1: \d of 4 clients"):
            play(micro(METHOD, of(mode), "strategy.min_fraction=1.0"), grid=grid)


def test_a_checkpoint_of_another_controller_is_refused(micro: Fixture, play: Fixture) -> None:
    small, large = (
        play(micro(METHOD, f"method.controller_size={k}", "num_rounds=1")).strategy for k in (4, 5)
    )
    with pytest.raises(ShapeError, match="expected a controller of"):
        large.restore(small.checkpoint(1))


# Evaluation and learning ------------------------------------------------------------------------------------------


def test_scores_are_the_same_whoever_holds_the_targets(micro: Fixture, play: Fixture) -> None:
    lines = []
    for mode in ("fedavg_controller", "label_private"):
        played = play(micro(METHOD, of(mode), LM, "num_rounds=1"), splits=("validation", "test"))
        lines.append([e for e in played.run.records("evaluation") if e["round"] == 0])
    assert len(lines[0]) == 8
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        assert (one["partition_id"], one["split"], one["correct"], one["total"]) == (
            two["partition_id"], two["split"], two["correct"], two["total"],
        )  # fmt: skip
        assert one["loss_sum"] == pytest.approx(two["loss_sum"], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_levels_are_routed(mode: str, micro: Fixture, play: Fixture) -> None:
    config = micro(METHOD, of(mode), "task=level_routing", "task.train_rows=60", "task.test_rows=60",
                   "task.validation_rows=-1", "num_rounds=8", "evaluate_every=8", "client.local_steps=9",
                   "partition=iid", "partition.num_clients=4", "method.reservoir_size=60")  # fmt: skip
    played = play(config, splits=("test",))
    assert played.run.records("round")[-1]["accuracy"] > 0.95


def test_several_steps_on_one_gradient_go_further_and_stay_finite(
    micro: Fixture, play: Fixture
) -> None:
    moved = {}
    for steps in (1, 4):
        played = play(micro(METHOD, f"method.micro_steps={steps}", "num_rounds=1", "optimizer=sgd",
                            "optimizer.learning_rate=0.1", "client.clip_norm=0"))  # fmt: skip
        start = played.strategy.spec.start(derive_seed(0, "controller")).numpy()
        moved[steps] = np.linalg.norm(played.strategy.controller - start)
    assert 2 * moved[1] < moved[4] < 8 * moved[1]


def test_a_run_has_its_baselines_and_cannot_be_evaluated_without_its_clients(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    """Local-only and centralised controllers are trained through the same exchanges, whatever the mode."""
    config = micro(METHOD, of("private_controller"), "num_rounds=1", "baselines.local_only=true",
                   "baselines.centralised=true", "baselines.predictors=true",
                   "baselines.learning_rates=[0.01,0.03]")  # fmt: skip
    summary = run(edge_grid(2), config, tmp_path / "run")
    for name in ("majority", "bag_of_words", "local", "central"):
        assert 0 <= summary[f"{name}_accuracy"] <= 1
    with pytest.raises(ConfigError, match="its controller works between clients and a server"):
        evaluate_run(RunDirectory.open(tmp_path / "run"), None)


def test_what_is_wrong_with_a_split_run_is_found_before_it_starts(micro: Fixture) -> None:
    preflight(micro(METHOD, LM))
    with pytest.raises(
        ConfigError, match=r"expected at most the .* positions of its context window"
    ):
        preflight(micro(METHOD, LM, "method.length=100000"))
    with pytest.raises(ConfigError, match="expected a graph with a cycle"):
        preflight(micro(METHOD, "method.density=0.0001"))
