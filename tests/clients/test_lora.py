import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients.lora import local_settings, start_factors
from clients.workspace import Asked, open_workspace
from fedllm_flwr import records
from fedllm_flwr.averaging import LowRank, dense, product_of
from fedllm_flwr.core import whole_json
from fedllm_flwr.models.adapters import AdapterLayout, initial_factors
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.training.settings import LocalSettings

Fixture = Callable[..., Any]


@pytest.fixture
def ask(edge_grid: Fixture) -> Callable[..., Any]:
    """Send one message to the only node of a grid and read the reply."""

    def asked(
        config: Any, kind: str, clients: list[int], parts: dict[str, np.ndarray], **body: Any
    ) -> Any:
        grid = edge_grid(1)
        common = {"config": json.loads(config.to_json()), "fingerprint": config.fingerprint(),
                  "partition-ids": clients, "server-round": 1, "side-held": "both", "delta-ranks": {}}  # fmt: skip
        own = {name.replace("_", "-"): value for name, value in body.items()}
        content = records.instruction(common | own, parts, "float32")
        (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
        assert reply.has_content(), reply.error
        found, arrays = records.read(reply, records.ANSWER)
        return found["clients"], arrays

    return asked


def server_adapter(config: Any, seed: int = 1, side: Any = "both") -> np.ndarray:
    work = open_workspace(whole_json(config))
    layout = AdapterLayout(work.shapes, config.method.server_spec().rank, side)
    return np.random.default_rng(seed).normal(0, 0.1, layout.size).astype(np.float32)


def train(ask: Fixture, config: Any, clients: list[int], adapter: np.ndarray, **body: Any) -> Any:
    given = {"side": "both", "learning_rate": config.optimizer.learning_rate} | body
    return ask(config, records.TRAIN, clients, {"adapter": adapter}, **given)


def test_a_training_reply_has_a_client_and_an_adapter_for_each_asked(
    micro: Fixture, ask: Fixture
) -> None:
    config = micro()
    infos, parts = train(ask, config, [3, 0, 2], server_adapter(config))
    assert [info["partition-id"] for info in infos] == [3, 0, 2]
    assert list(parts) == ["3/adapter", "0/adapter", "2/adapter"]
    work = open_workspace(whole_json(config))
    for info in infos:
        assert info["num-examples"] == len(work.clients[info["partition-id"]].train)
        assert info["steps"] == 2
        assert info["error"] == ""
        assert info["loss"] > 0


def test_clients_are_independent_of_their_company(micro: Fixture, ask: Fixture) -> None:
    config, adapter = micro(), server_adapter(micro())
    _, together = train(ask, config, [0, 1, 2, 3], adapter)
    for client in range(4):
        _, alone = train(ask, config, [client], adapter)
        np.testing.assert_array_equal(alone[f"{client}/adapter"], together[f"{client}/adapter"])


def test_seed_and_round_address_the_order_of_rows(micro: Fixture, ask: Fixture) -> None:
    config, adapter = micro(), server_adapter(micro())
    one = train(ask, config, [0], adapter)[1]["0/adapter"]
    np.testing.assert_array_equal(train(ask, config, [0], adapter)[1]["0/adapter"], one)
    other = train(ask, config, [0], adapter, server_round=2)[1]["0/adapter"]
    assert np.abs(other - one).max() > 1e-4


@pytest.mark.parametrize(("side", "moved"), [("a", "lora_a"), ("b", "lora_b")])
def test_one_side_is_trained_and_sent_and_the_other_stays(
    side: Any, moved: str, micro: Fixture, ask: Fixture
) -> None:
    config = micro()
    work, rank = open_workspace(whole_json(config)), config.method.rank
    adapter = server_adapter(config)
    _, parts = train(ask, config, [1], adapter, side=side)
    whole = AdapterLayout(work.shapes, rank).unpack(adapter, 1.0)
    layout = AdapterLayout(work.shapes, rank, side)
    assert parts["1/adapter"].size == layout.size
    found = layout.unpack(parts["1/adapter"], 1.0, frozen=whole)
    for name in whole:
        assert np.abs(getattr(found[name], moved) - getattr(whole[name], moved)).max() > 1e-3


def asked_for(config: Any, parts: dict[str, np.ndarray], held: str = "both") -> Asked:
    return Asked(open_workspace(whole_json(config)), {"side-held": held}, parts)


def test_a_start_is_the_servers_adapter_at_the_clients_rank_and_scaling(micro: Fixture) -> None:
    config = micro("method.client_ranks=[4,2]", "method.client_alphas=[8,3]")
    flat = server_adapter(config)
    server = config.method.server_spec()
    work = open_workspace(whole_json(config))
    given = AdapterLayout(work.shapes, server.rank).unpack(flat, server.scaling)
    for client, rank in ((0, 4), (1, 2)):
        found = start_factors(asked_for(config, {"adapter": flat}), client, 1)
        for name, factors in found.items():
            assert (factors.rank, factors.scaling) == (rank, config.method.spec(client).scaling)
            np.testing.assert_array_equal(factors.lora_a, given[name].lora_a[:rank])
            cut = dense(
                LowRank(server.scaling * given[name].lora_b[:, :rank], given[name].lora_a[:rank])
            )
            np.testing.assert_allclose(dense(product_of(factors)), cut, rtol=0, atol=1e-6)


def test_without_an_adapter_a_start_is_the_rounds_own_draw(micro: Fixture) -> None:
    config = micro("strategy=stack")
    work, spec = open_workspace(whole_json(config)), config.method.spec(0)
    for server_round in (1, 2):
        found = start_factors(asked_for(config, {}), 0, server_round)
        seed = derive_seed(config.seed, "lora_a", server_round)
        expected = initial_factors(work.shapes, spec, seed)
        for name, factors in found.items():
            np.testing.assert_array_equal(factors.lora_a, expected[name].lora_a)
            assert not factors.lora_b.any()
    one, two = (start_factors(asked_for(config, {}), 0, r) for r in (1, 2))
    assert all(np.abs(one[n].lora_a - two[n].lora_a).max() > 1e-3 for n in one)


def test_a_frozen_a_is_the_seeds_and_never_travels(micro: Fixture) -> None:
    config = micro("method.sharing=b_only")
    work, spec = open_workspace(whole_json(config)), config.method.server_spec()
    flat = server_adapter(config, side="b")
    found = start_factors(asked_for(config, {"adapter": flat}, "b"), 2, 5)
    expected = initial_factors(work.shapes, spec, derive_seed(config.seed, "lora_a", 0))
    for name, factors in found.items():
        np.testing.assert_array_equal(factors.lora_a, expected[name].lora_a)
        assert factors.lora_b.any()


def evaluated(ask: Fixture, config: Any, parts: dict[str, np.ndarray], **body: Any) -> Any:
    given = {"splits": ["validation", "test"], "template": ""} | body
    infos, arrays = ask(config, records.EVALUATE, [0, 1, 2, 3], parts, **given)
    assert arrays == {}
    return infos


def test_an_adapter_whose_b_is_zero_evaluates_like_the_plain_model(
    micro: Fixture, ask: Fixture
) -> None:
    config = micro()
    work = open_workspace(whole_json(config))
    first = initial_factors(work.shapes, config.method.server_spec(), 3)
    flat = AdapterLayout(work.shapes, config.method.rank).pack(first)
    plain = evaluated(ask, config, {})
    assert evaluated(ask, config, {"adapter": flat}) == plain
    assert evaluated(ask, config, {"adapter": server_adapter(config)}) != plain


def test_every_held_out_row_of_a_client_is_counted_once(micro: Fixture, ask: Fixture) -> None:
    config = micro()
    work = open_workspace(whole_json(config))
    for info in evaluated(ask, config, {}):
        for split, sums in info["splits"].items():
            assert sums["total"] == len(getattr(work.clients[info["partition-id"]], split))
            assert sums["label_tokens"] == sums["total"]
            assert 0 <= sums["correct"] <= sums["total"]


def test_a_carried_delta_does_what_the_same_adapter_does(micro: Fixture, ask: Fixture) -> None:
    config = micro()
    work, spec = open_workspace(whole_json(config)), config.method.server_spec()
    flat = server_adapter(config)
    factors = AdapterLayout(work.shapes, spec.rank).unpack(flat, spec.scaling)
    delta, ranks = records.pack_delta({name: product_of(f) for name, f in factors.items()})
    adapted = evaluated(ask, config, {"adapter": flat})
    carried = evaluated(ask, config, {"delta": delta}, delta_ranks=ranks)
    for one, other in zip(adapted, carried, strict=True):
        for split, sums in one["splits"].items():
            assert other["splits"][split]["correct"] == sums["correct"]
            assert other["splits"][split]["loss_sum"] == pytest.approx(sums["loss_sum"], rel=1e-4)


def test_another_template_asks_another_question(micro: Fixture, ask: Fixture) -> None:
    config = micro()
    topic, about = (evaluated(ask, config, {}, template=name) for name in ("topic", "about"))
    assert evaluated(ask, config, {}) == topic
    assert topic != about


def test_training_settings_are_the_configurations(micro: Fixture) -> None:
    config = micro("client.batch_size=3", "client.local_steps=5", "client.gradient_accumulation=2",
                   "client.clip_norm=0.5", "client.proximal_mu=0.25", "optimizer.weight_decay=0.01",
                   "optimizer.beta1=0.8", "optimizer.beta2=0.95", "runtime.cohort_tokens=99")  # fmt: skip
    found = local_settings(open_workspace(whole_json(config)), 0.125, "b")
    assert dataclasses.asdict(found) == {
        "batch_size": 3, "local_epochs": 1, "local_steps": 5, "learning_rate": 0.125, "optimizer": "adamw",
        "weight_decay": 0.01, "momentum": 0.0, "beta1": 0.8, "beta2": 0.95, "gradient_accumulation": 2,
        "clip_norm": 0.5, "proximal_mu": 0.25, "cohort_tokens": 99, "side": "b",
        "sample_privacy": None, "ascend": False, "checkpointing": False,
    }  # fmt: skip
    assert isinstance(found, LocalSettings)


def test_epochs_are_epochs(micro: Fixture, ask: Fixture) -> None:
    config = micro("client.local_epochs=2", "client.local_steps=0", "client.batch_size=4")
    infos, _ = train(ask, config, [0, 1, 2, 3], server_adapter(config))
    for info in infos:
        assert info["steps"] == 2 * -(-info["num-examples"] // 4)


def test_the_proximal_term_keeps_clients_near_their_start(micro: Fixture, ask: Fixture) -> None:
    sgd = (
        "optimizer=sgd",
        "optimizer.learning_rate=0.5",
        "client.local_steps=4",
        "client.clip_norm=0",
    )
    adapter = server_adapter(micro(*sgd))
    distances = []
    for mu in (0.0, 1.0):
        _, parts = train(ask, micro(*sgd, f"client.proximal_mu={mu}"), [0], adapter)
        distances.append(np.linalg.norm(parts["0/adapter"] - adapter))
    assert distances[1] < 0.9 * distances[0]


def test_a_client_that_cannot_begin_says_so_in_its_own_place(micro: Fixture, ask: Fixture) -> None:
    config = micro(
        "fairness=group_dro", "fairness.groups=inferred"
    )  # the task has nothing to infer
    infos, parts = train(ask, config, [2, 0], server_adapter(config), group_weights={})
    assert [info["partition-id"] for info in infos] == [2, 0]
    assert parts == {}
    for info in infos:
        client = info["partition-id"]
        assert (
            info["error"] == f"client {client}: start failed (ConfigError); the node's log says why"
        )
