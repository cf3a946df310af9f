"""End to end: what the server holds after a round is what its rule says of the adapters that crossed the wire."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.averaging import dense

Fixture = Callable[..., Any]
SGD = ("optimizer=sgd", "optimizer.learning_rate=0.5")
TOLERANCE = 1e-6
"""Products are below 1 and are rounded to float32 a few times: 1e-8 each."""


def raw_replies(grid: Any, server_round: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Each client's flat array and info, cut from the replies without this project's own reader."""
    rounds = {
        m.metadata.message_id: json.loads(m.content["instruction"]["body"]).get("server-round")
        for m in grid.sent
    }
    found = []
    for reply in grid.replies:
        asked_in = rounds[reply.metadata.reply_to_message_id]
        if reply.metadata.message_type != "train" or asked_in != server_round:
            continue
        record = reply.content["answer"]
        flat, start = reply.content["arrays"]["flat"].numpy(), 0
        infos = json.loads(record["body"])["clients"]
        for (name, size), info in zip(json.loads(record["parts"]), infos, strict=True):
            assert name == f"{info['partition-id']}/adapter"
            found.append((flat[start : start + size].astype(np.float64), info))
            start += size
    return found


def mean_update(
    played: Any, server_round: int, shared: Callable[..., Any] | None = None, side: str = "both"
) -> dict[str, np.ndarray]:
    """The weighted mean of the clients' dense updates in float64, by layer.

    ``shared`` gives the factor that clients do not send: ``shared(layer, spec)`` is A or B at a client's rank, with
    whatever scaling makes the product with the sent factor the client's update.
    """
    shapes = sorted(played.strategy.shapes, key=lambda shape: shape.name)
    total = {s.name: np.zeros((s.out_features, s.in_features)) for s in shapes}
    weights = 0
    for flat, info in raw_replies(played.grid, server_round):
        spec, start = played.strategy.config.method.spec(info["partition-id"]), 0
        for shape in shapes:
            sent = {}
            for name, width in (("a", shape.in_features), ("b", shape.out_features)):
                if side in ("both", name):
                    sent[name] = flat[start : start + spec.rank * width]
                    start += spec.rank * width
            a = sent["a"].reshape(spec.rank, -1) if "a" in sent else shared(shape.name, spec)
            b = sent["b"].reshape(-1, spec.rank) if "b" in sent else shared(shape.name, spec)
            scaling = spec.scaling if side != "a" else 1.0
            total[shape.name] += info["num-examples"] * scaling * (b @ a)
        assert start == flat.size
        weights += info["num-examples"]
    return {name: value / weights for name, value in total.items()}


def assert_products(played: Any, expected: dict[str, np.ndarray]) -> None:
    for layer, update in expected.items():
        assert np.abs(update).max() > 1000 * TOLERANCE, (
            "an update of nothing would agree with anything"
        )
        np.testing.assert_allclose(played.product(layer), update, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def rounds(configured: Fixture, play: Fixture) -> Callable[[str], list[Any]]:
    """The states of a case after one round and after two, trained with plain SGD."""

    @cache
    def both(which: str) -> list[Any]:
        return [play(configured(which, *SGD, f"num_rounds={n}")) for n in (1, 2)]

    return both


@pytest.mark.parametrize("which", ["stack", "residual", "stack_mixed", "residual_mixed"])
def test_exact_rules_hold_the_mean_of_the_products(which: str, rounds: Fixture) -> None:
    one, two = rounds(which)
    assert_products(one, mean_update(one, 1))
    carried = {layer: dense(update) for layer, update in one.strategy.model.delta.items()}
    mean = mean_update(two, 2)
    assert_products(two, {layer: carried[layer] + mean[layer] for layer in mean})


@pytest.mark.parametrize("which", ["svd", "svd_mixed"])
def test_svd_holds_the_best_approximation_of_the_mean(which: str, rounds: Fixture) -> None:
    for server_round, played in enumerate(rounds(which), start=1):
        rank, expected = played.strategy.spec.rank, {}
        for layer, mean in mean_update(played, server_round).items():
            u, singular, vt = np.linalg.svd(mean, full_matrices=False)
            expected[layer] = (u[:, :rank] * singular[:rank]) @ vt[:rank]
        assert_products(played, expected)
    lost = [np.abs(mean - expected[layer]).max() for layer, mean in mean_update(played, 2).items()]
    assert max(lost) > 1e-3, "the mean has no more directions than the server's rank"


@pytest.mark.parametrize("which", ["b_only", "b_only_mixed"])
def test_the_factor_mean_is_exact_when_a_is_shared(which: str, rounds: Fixture) -> None:
    for server_round, played in enumerate(rounds(which), start=1):
        frozen = played.strategy.model.factors

        def first_rows(layer: str, spec: Any, frozen: Any = frozen) -> np.ndarray:
            return frozen[layer].lora_a[: spec.rank].astype(np.float64)

        assert_products(played, mean_update(played, server_round, first_rows, "b"))


@pytest.mark.parametrize("which", ["alternating", "alternating_mixed"])
def test_the_factor_mean_is_exact_when_b_is_shared(which: str, rounds: Fixture) -> None:
    one, two = rounds(which)
    shared = one.strategy.model.factors

    def first_columns(layer: str, spec: Any) -> np.ndarray:
        return shared[layer].scaling * shared[layer].lora_b[:, : spec.rank].astype(np.float64)

    assert_products(two, mean_update(two, 2, first_columns, "a"))


def test_the_plain_factor_mean_is_not_the_mean_of_the_products(rounds: Fixture) -> None:
    two = rounds("factor_mean")[1]
    gaps = [np.abs(two.product(layer) - mean).max() for layer, mean in mean_update(two, 2).items()]
    assert max(gaps) > 100 * TOLERANCE
