import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from clients.contexts import contexts_of
from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.core import whole_json
from fedllm_flwr.models import backbone
from fedllm_flwr.reservoir import Controller
from fedllm_flwr.seeding import derive_seed

Fixture = Callable[..., Any]
METHOD = "method=fedresprompt"
SGD = (METHOD, "optimizer=sgd", "optimizer.learning_rate=0.5", "client.clip_norm=0")


@pytest.fixture
def ask(edge_grid: Fixture) -> Callable[..., Any]:
    """Send one message to the only node of a grid and read the reply; the grid keeps its context."""

    def asked(
        config: Any, kind: str, clients: list[int], parts: Any, grid: Any = None, **body: Any
    ) -> Any:
        common = {"config": json.loads(config.to_json()), "fingerprint": config.fingerprint(), "run": "r",
                  "partition-ids": clients, "server-round": 1,
                  "learning-rate": config.optimizer.learning_rate}  # fmt: skip
        content = records.instruction(common | body, parts, "float32")
        grid = grid or edge_grid(1)
        (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
        assert reply.has_content(), reply.error
        found, arrays = records.read(reply, records.ANSWER)
        return found["clients"], arrays

    return asked


def start_of(config: Any) -> tuple[Any, np.ndarray]:
    spec = contexts_of(open_workspace(whole_json(config))).spec
    return spec, spec.start(derive_seed(config.seed, "controller")).numpy()


def test_a_round_of_one_client_is_the_controllers_own_steps(
    micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    """Prompts up, gradients down, both gradients by the old P: compared with the controller driven by hand."""
    config, grid = micro(*SGD), edge_grid(1)
    spec, start = start_of(config)
    random = np.random.default_rng(0)
    infos, parts = ask(config, records.TRAIN, [0], {"controller": start}, grid)
    by_hand = Controller(spec, torch.from_numpy(start))
    work = open_workspace(whole_json(config))
    z = contexts_of(work).states(0, "train")
    for step in range(2):
        sent = torch.from_numpy(parts["0/prompts"]).view(infos[0]["rows"], 2, 64)
        _, all_prompts = by_hand.prompts(z)
        rows = [int((all_prompts - own).flatten(1).norm(dim=1).argmin()) for own in sent]
        torch.testing.assert_close(all_prompts[rows], sent, rtol=0, atol=1e-6)
        assert infos[0]["targets"] == [work.rows(0).train[i].label for i in rows]
        gradient = random.normal(size=sent.shape).astype(np.float32)
        b, _ = by_hand.prompts(z[rows])
        slope = by_hand.gradient(z[rows], b, torch.from_numpy(gradient))
        by_hand.flat.data -= 0.5 * slope
        infos, parts = ask(config, records.EXCHANGE, [0], {"0/gradient": gradient.ravel()}, grid,
                           stage="gradient", exchange=step + 1)  # fmt: skip
        if step == 0:
            assert infos[0]["error"] == ""
    np.testing.assert_allclose(parts["0/controller"], by_hand.flat.data, rtol=0, atol=2e-6)
    assert (infos[0]["steps"], infos[0]["num-examples"]) == (2, len(work.rows(0).train))
    assert not grid.contexts[1000].state.keys()


def test_a_client_needs_no_layer_of_the_model(micro: Fixture, ask: Fixture) -> None:
    backbone.reset()
    config = micro(METHOD, "method.server_model=lm", "seed=11")
    _, start = start_of(config)
    _, parts = ask(config, records.TRAIN, [0, 1], {"controller": start})
    assert set(parts) == {"0/prompts", "1/prompts"}
    assert backbone._LOADED == {}


def test_an_exchange_out_of_order_fails_by_name_and_alone(
    micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    config, grid = micro(METHOD), edge_grid(1)
    _, start = start_of(config)
    first, _ = ask(config, records.TRAIN, [0], {"controller": start}, grid)
    down = {f"{p}/gradient": np.zeros(first[0]["rows"] * 128, np.float32) for p in (0, 1)}
    infos, _ = ask(config, records.EXCHANGE, [0, 1], down, grid, stage="gradient", exchange=1)
    assert infos[0]["error"] == ""
    assert infos[1]["error"].startswith("client 1: expected to be asked for round, exchange None")
    infos, _ = ask(config, records.EXCHANGE, [0], down, grid, stage="gradient", exchange=1)
    assert (
        "client 0: expected to be asked for round, exchange (1, 2), got (1, 1)" in infos[0]["error"]
    )
    infos, _ = ask(config, records.EXCHANGE, [0], down, grid, stage="other", exchange=2)
    assert "stage: expected one of" in infos[0]["error"]


@pytest.mark.parametrize("size", [0, 3])
def test_a_message_without_the_right_parts_is_refused(
    size: int, micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    config, grid = micro(METHOD), edge_grid(1)
    spec, start = start_of(config)
    wrong = {"controller": np.ones(size, np.float32)} if size else {}
    infos, _ = ask(config, records.TRAIN, [0], wrong, grid)
    assert infos[0]["error"] == f"part controller: expected {spec.size} values, got {size}"
    ask(config, records.TRAIN, [0], {"controller": start}, grid)
    wrong = {"0/gradient": np.ones(size, np.float32)} if size else {}
    infos, _ = ask(config, records.EXCHANGE, [0], wrong, grid, stage="gradient", exchange=1)
    assert "client 0, part gradient: expected" in infos[0]["error"]


def test_a_private_label_becomes_a_slope(micro: Fixture, ask: Fixture, edge_grid: Fixture) -> None:
    config, grid = micro(METHOD, "method.mode=label_private"), edge_grid(1)
    _, start = start_of(config)
    infos, _ = ask(config, records.TRAIN, [0], {"controller": start}, grid)
    rows = infos[0]["rows"]
    assert "targets" not in infos[0]
    logits = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    _, parts = ask(config, records.EXCHANGE, [0], {"0/logits": logits.ravel()}, grid,
                   stage="logits", exchange=1)  # fmt: skip
    slope = parts["0/slope"].reshape(rows, 4)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(np.sort(softmax - slope, axis=1)[:, :3], 0, atol=1e-6)
    np.testing.assert_allclose(np.max(softmax - slope, axis=1), 1, atol=1e-6)


def test_noise_is_on_what_leaves(micro: Fixture, ask: Fixture) -> None:
    sent = []
    for noise in ("0", "0.5", "0.5"):
        config = micro(METHOD, "method.clip_norm=1", f"method.noise_multiplier={noise}")
        _, start = start_of(config)
        _, parts = ask(config, records.TRAIN, [0], {"controller": start})
        sent.append(parts["0/prompts"])
    assert np.linalg.norm(sent[0].reshape(-1, 128), axis=1).max() <= 1 + 1e-6
    assert np.std(sent[1] - sent[0]) == pytest.approx(0.5, rel=0.2)
    assert np.std(sent[2] - sent[1]) == pytest.approx(0.5 * 2**0.5, rel=0.2)
