import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.outgoing import Trained, encoded_parts
from clients.personal import PersonalStore
from clients.workspace import Asked, Workspace
from fedllm_flwr.errors import WireError

Fixture = Callable[..., Any]
SHAPES = ((6, 10),)
START = np.random.default_rng(0).standard_normal(60, dtype=np.float32)


def context(folder: Path | None = None) -> Context:
    facts = {"state-path": str(folder)} if folder else {}
    return Context(run_id=1, node_id=1, node_config=facts, state=RecordDict(), run_config={})


@pytest.fixture
def asked(micro: Fixture) -> Callable[..., Asked]:
    """A round's message to a node, under some wire."""

    def made(server_round: int, *overrides: str, run: str = "r") -> Asked:
        work = Workspace(micro(*overrides), None, ())  # type: ignore[arg-type]
        return Asked(work, {"server-round": server_round, "run": run}, {})

    return made


def trained(seed: int, scale: float = 0.1) -> Trained:
    moved = scale * np.random.default_rng(seed).standard_normal(60)
    return Trained((START + moved).astype(np.float32), START, SHAPES)


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_values_leave_as_they_are(wire: str, asked: Fixture) -> None:
    part, node = trained(1), context()
    sent = encoded_parts(asked(1, f"wire={wire}"), node, 0, {"adapter": part})
    assert sent["adapter"] is part.values
    assert not node.state


@pytest.mark.parametrize("wire", ["int8", "int4", "top_k", "low_rank"])
def test_over_rounds_all_that_was_trained_arrives_but_for_the_last_residual(
    wire: str, asked: Fixture
) -> None:
    """With error feedback the errors do not add up: what is missing after t rounds is one residual."""
    node, overrides = (
        context(),
        (f"wire={wire}", "wire.low_rank=2")[: 2 if wire == "low_rank" else 1],
    )
    arrived, total = np.zeros(60), np.zeros(60)
    for server_round in range(1, 9):
        message, part = asked(server_round, *overrides), trained(server_round)
        codec = message.work.config.wire.codec("uplink")
        sent = encoded_parts(message, node, 3, {"adapter": part})
        arrived += codec.decode(sent["adapter"], SHAPES)
        total += part.values - part.received
    store = PersonalStore(node, "r", 4, "residual")
    left_out = store.load(3, 9)
    assert left_out is not None
    np.testing.assert_allclose(arrived + left_out, total, rtol=0, atol=1e-6)
    assert store.load(2, 9) is None


def test_parts_share_one_residual_in_the_order_of_their_names(asked: Fixture) -> None:
    parts = {"shared": trained(1), "cluster": Trained(START[:7] + 1, START[:7], ((7,),))}
    node, message = context(), asked(1, "wire=top_k")
    sent = encoded_parts(message, node, 0, parts)
    kept = PersonalStore(node, "r", 4, "residual").load(0, 2)
    assert kept is not None
    assert kept.size == 67
    codec = message.work.config.wire.codec("uplink")
    update = parts["cluster"].values - parts["cluster"].received
    np.testing.assert_array_equal(kept[:7], update - codec.decode(sent["cluster"], ((7,),)))


def test_the_same_round_asked_again_sends_the_same_bytes(asked: Fixture, tmp_path: Path) -> None:
    node = context(tmp_path)
    encoded_parts(asked(1, "wire=top_k"), node, 0, {"adapter": trained(1)})
    one = encoded_parts(asked(2, "wire=top_k"), node, 0, {"adapter": trained(2)})
    for again in (node, context(tmp_path)):  # the same node, and after a restart
        two = encoded_parts(asked(2, "wire=top_k"), again, 0, {"adapter": trained(2)})
        np.testing.assert_array_equal(two["adapter"], one["adapter"])
    other = encoded_parts(asked(2, "wire=top_k", run="s"), node, 0, {"adapter": trained(2)})
    assert (other["adapter"] != one["adapter"]).any(), "another run has another residual"


def test_kinds_do_not_mix(asked: Fixture) -> None:
    node = context()
    for kind in ("a", "b"):
        encoded_parts(asked(1, "wire=top_k"), node, 0, {"adapter": trained(1)}, kind)
    stores = [PersonalStore(node, "r", 4, f"residual-{kind}") for kind in ("a", "b", "c")]
    assert [store.load(0, 2) is not None for store in stores] == [True, True, False]


@pytest.mark.parametrize("wire", ["int8", "int4", "top_k", "low_rank"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named_and_nothing_is_kept(
    wire: str, bad: float, asked: Fixture
) -> None:
    part, node = trained(1), context()
    part = dataclasses.replace(
        part, values=np.where(np.arange(60) == 5, np.float32(bad), part.values)
    )
    overrides = (f"wire={wire}", *(("wire.low_rank=2",) if wire == "low_rank" else ()))
    with pytest.raises(
        WireError, match=rf"client 4, part adapter: codec {wire}: .* got {bad} at 5"
    ):
        encoded_parts(asked(1, *overrides), node, 4, {"adapter": part})
    assert not node.state


def test_a_residual_of_another_size_is_refused(asked: Fixture) -> None:
    node = context()
    PersonalStore(node, "r", 4, "residual").save(0, 1, np.zeros(9, np.float32))
    with pytest.raises(WireError, match="client 0: expected a kept residual of 60 values, got 9"):
        encoded_parts(asked(2, "wire=int8"), node, 0, {"adapter": trained(1)})


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_what_leaves_and_what_is_kept_come_from_the_clipped_update(
    wire: str, asked: Fixture
) -> None:
    node, bound = context(), 0.25
    overrides = (
        "privacy=local",
        "privacy.noise_multiplier=0",
        f"privacy.clip_norm={bound}",
        f"wire={wire}",
    )
    message, part = asked(1, *overrides), trained(1)
    update = (part.values - part.received).astype(np.float64)
    assert np.linalg.norm(update) > 2 * bound
    wanted = update * bound / np.linalg.norm(update)
    sent = encoded_parts(message, node, 0, {"adapter": part})["adapter"]
    settings = message.work.config.wire
    if not settings.sends_updates:
        np.testing.assert_allclose(sent - part.received, wanted, rtol=0, atol=1e-6)
        return
    arrived = settings.codec("uplink").decode(sent, SHAPES)
    np.testing.assert_allclose(arrived, wanted, rtol=0, atol=np.abs(wanted).max() / 250)
    if settings.error_feedback:
        kept = PersonalStore(node, "r", 4, "residual").load(0, 2)
        np.testing.assert_allclose(arrived + kept, wanted, rtol=0, atol=1e-6)
