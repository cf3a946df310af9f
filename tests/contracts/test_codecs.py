"""Codecs end to end: what the server counts, what clients keep, exact bytes, and runs that go on after a stop."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from clients.personal import PersonalStore
from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.codecs import CODECS, FLOAT_CODECS
from fedllm_flwr.models.adapters import AdapterLayout

Fixture = Callable[..., Any]
LOSSY = [name for name in CODECS if name not in FLOAT_CODECS]
SMALL = ("wire.low_rank=2",)
PROMPT = ("method=fedprompt", "method.length=6", "wire.low_rank=2")
BOTH = {
    name: (f"wire={name}", f"wire.downlink={name}", *(SMALL if name == "low_rank" else ()))
    for name in CODECS
}
"""Overrides that send with a codec in both directions."""


def both_ways(name: str, *overrides: str) -> tuple[str, ...]:
    own = [o for o in overrides if not o.startswith("wire.low_rank") or name == "low_rank"]
    return (*BOTH[name], *own)


CASES = {
    **{f"lora_{name}": both_ways(name) for name in LOSSY},
    **{f"prompt_{name}": both_ways(name, *PROMPT) for name in LOSSY},
    "b_only": (*both_ways("top_k"), "method.sharing=b_only", "method.client_ranks=[4,2,1,8]"),
    "alternating": (*both_ways("int8"), "method.sharing=alternating", "method.client_ranks=[4,2]"),
    "residual": (*both_ways("int4"), "strategy=residual", "method.client_alphas=[8,4,16]"),
    "stack": ("wire=int8", "wire.error_feedback=false", "strategy=stack"),
    "mixed": ("wire=top_k", "wire.downlink=bfloat16", "strategy.server_optimizer=fedadam",
              "strategy.server_learning_rate=0.01"),
    "values_up": ("wire=float32", "wire.downlink=int4"),
    "cluster": (*both_ways("int8", *PROMPT), "method.cluster_length=2", "fairness=bounded_loss"),
    "own_starts": (*both_ways("top_k", *PROMPT), "method.common_start=false"),
}  # fmt: skip
"""Every codec both ways for both methods, and each kind of start that an update is counted from."""


@pytest.fixture(scope="module")
def played(micro: Fixture, play: Fixture) -> Callable[..., Any]:
    """Three rounds on two nodes."""
    return cache(lambda *overrides: play(micro(*overrides, "keep_checkpoints=9")))


def trained_messages(grid: Any) -> tuple[list[Message], list[Message]]:
    def chosen(messages: list[Message]) -> list[Message]:
        return [m for m in messages if m.metadata.message_type == records.TRAIN]

    return chosen(grid.sent), chosen(grid.replies)


@pytest.mark.parametrize("which", CASES)
def test_a_run_that_goes_on_ends_with_the_same_bits(
    which: str, played: Fixture, play: Fixture, tmp_path: Path
) -> None:
    whole = played(*CASES[which])
    folder = tmp_path / "run"
    shutil.copytree(whole.run.path, folder)
    for later in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"round-{later:04d}")
    resumed = play(whole.strategy.config, folder=folder)
    assert resumed.sha == whole.sha
    kept = [r["partition_id"] for r in whole.run.records("client") if r["round"] == 3]
    assert kept == [0, 1, 2, 3]
    assert max(np.abs(effect).max() for effect in whole.effects.values()) > 1e-5


@pytest.mark.parametrize("which", ["lora_int8", "lora_low_rank", "prompt_top_k", "residual"])
def test_hosting_does_not_matter(
    which: str, micro: Fixture, play: Fixture, played: Fixture
) -> None:
    other = play(micro(*CASES[which], "runtime.num_nodes=4", "keep_checkpoints=9"))
    assert other.sha == played(*CASES[which]).sha


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_arrays_have_the_bytes_that_the_codec_says(
    codec: str, method: str, played: Fixture
) -> None:
    run = played(*both_ways(codec, *(PROMPT if method == "prompt" else ())))
    strategy = run.strategy
    if method == "lora":
        shapes: Any = AdapterLayout(strategy.shapes, strategy.spec.rank).shapes
    else:
        shapes = ((6, strategy.parts["shared"].size // 6),)
    sent, replies = trained_messages(run.grid)
    assert len(sent) == len(replies) == 6
    for messages, direction in ((sent, "downlink"), (replies, "uplink")):
        expected = strategy.config.wire.codec(direction).size_bytes(shapes)
        for message in messages:  # two clients on each node answer together
            record = "instruction" if direction == "downlink" else "answer"
            parts = json.loads(message.content[record]["parts"])
            assert len(parts) == (1 if direction == "downlink" else 2)
            assert message.content["arrays"]["flat"].numpy().nbytes == len(parts) * expected


def test_a_node_that_loses_what_it_kept_goes_on_from_zero(
    played: Fixture, play: Fixture, tmp_path: Path
) -> None:
    whole = played(*CASES["lora_top_k"])
    folder = tmp_path / "run"
    shutil.copytree(whole.run.path, folder)
    shutil.rmtree(folder / "checkpoints" / "round-0003")
    shutil.rmtree(folder / "clients")
    resumed = play(whole.strategy.config, folder=folder)
    assert resumed.sha != whole.sha
    assert [r["partition_id"] for r in resumed.run.records("client")][-4:] == [0, 1, 2, 3]


def test_float32_counts_what_clients_sent_to_the_bit(played: Fixture) -> None:
    """No start is looked at, and nothing is added to values that came whole."""
    strategy = played("wire=float32").strategy
    assert strategy._starts == {}


@pytest.mark.parametrize("method", [(), PROMPT[:2], ("method.sharing=b_only",)], ids=str)
def test_a_fraction_of_one_is_float32_to_rounding(method: tuple[str, ...], played: Fixture) -> None:
    exact = played(*method, "wire=float32", "optimizer=sgd", "optimizer.learning_rate=0.2")
    whole = played(*method, "wire=flasc", "wire.top_k_fraction=1.0", "optimizer=sgd",
                   "optimizer.learning_rate=0.2")  # fmt: skip
    for name, effect in exact.effects.items():
        np.testing.assert_allclose(whole.effects[name], effect, rtol=0, atol=1e-6)


def residuals(run: Any, client: int, kind: str = "residual-both") -> dict[int, np.ndarray]:
    """What a client has on its disk, by round."""
    folder = run.run.path / "clients" / run.strategy.run / kind / str(client)
    return {
        int(path.stem.removeprefix("round-")): np.fromfile(path, "<f4")
        for path in folder.glob("*.f32")
    }


def sent_updates(run: Any, client: int) -> list[np.ndarray]:
    """What a client sent, by round, decoded."""
    codec, found = run.strategy.config.wire.codec("uplink"), []
    for reply in trained_messages(run.grid)[1]:
        _, parts = records.read(reply, records.ANSWER)
        if f"{client}/adapter" in parts:
            found.append(codec.decode(parts[f"{client}/adapter"], run.strategy.layout.shapes))
    return found


def test_what_is_sent_and_what_is_kept_are_the_update_exactly(
    micro: Fixture, play: Fixture
) -> None:
    """FLASC's wire: with one client and no error on the way down its updates can be followed from the outside."""
    one = (
        "partition.num_clients=1",
        "num_rounds=2",
        "runtime.num_nodes=1",
        "wire.top_k_fraction=0.1",
    )
    run = play(micro("wire=flasc", *one, "keep_checkpoints=9"))
    first, second = sent_updates(run, 0)
    kept = residuals(run, 0)
    assert sorted(kept) == [1, 2]
    count = run.strategy.config.wire.codec("uplink").kept(first.size)
    for sent, left_out in ((first, kept[1]), (second, kept[2])):
        assert np.count_nonzero(sent) == count
        assert not (sent * left_out).any(), "a value is sent whole or kept whole"
    dense = play(micro("wire=float32", *one[:3], "num_rounds=1"))
    start = dense.strategy.layout.pack(dense.strategy._first)
    update = dense.strategy.layout.pack(dense.strategy.model.factors) - start
    np.testing.assert_array_equal(first + kept[1], update)
    after = run.strategy.layout.pack(run.strategy.model.factors) - start
    np.testing.assert_allclose(after, first + second, rtol=0, atol=1e-7)


def test_without_error_feedback_nothing_is_kept_and_more_is_lost(played: Fixture) -> None:
    kept = played("wire=top_k", "wire.top_k_fraction=0.02")
    lost = played("wire=top_k", "wire.top_k_fraction=0.02", "wire.error_feedback=false")
    assert sorted(residuals(kept, 0)) == [1, 2, 3]
    assert not residuals(lost, 0)
    np.testing.assert_array_equal(sent_updates(kept, 0)[0], sent_updates(lost, 0)[0])
    assert np.abs(sent_updates(kept, 0)[1] - sent_updates(lost, 0)[1]).max() > 0


def test_a_round_that_is_asked_again_adds_the_residual_once(
    micro: Fixture, play: Fixture, edge_grid: Fixture, played: Fixture
) -> None:
    overrides = ("wire=top_k", "strategy.max_retries=1", "strategy.min_fraction=1.0")
    state: dict[str, bool] = {}

    def lose_once(asked: list[Message], replies: list[Message]) -> list[Message]:
        body = records.read_body(asked[0])
        if body.get("server-round") == 2 and not state.setdefault("lost", False):
            state["lost"] = True
            return []
        return replies

    config = micro(*overrides, "keep_checkpoints=9")
    grid = edge_grid(config.runtime.num_nodes, lose_once)
    retried = play(config, grid=grid)
    assert state["lost"]
    assert retried.sha == played(*overrides).sha


def test_sides_have_residuals_of_their_own(played: Fixture) -> None:
    run = played(*CASES["alternating"])
    assert sorted(residuals(run, 0, "residual-b")) == [1, 3]
    assert sorted(residuals(run, 0, "residual-a")) == [2]


def test_the_server_keeps_what_the_way_down_leaves_out(played: Fixture) -> None:
    """With values up and top-k down, the model would else be cut to a tenth of itself in every round."""
    run = played("wire=float32", "wire.downlink=top_k")
    strategy = run.strategy
    moved = strategy.layout.pack(strategy.model.factors) - strategy.layout.pack(strategy._first)
    assert np.count_nonzero(moved) > 0.5 * moved.size
    strategy.begin_sum(4)
    start = strategy.start_of(0, 4)
    known = strategy.layout.pack(strategy._first)
    assert np.count_nonzero(start.received - known) <= 0.1 * moved.size + 1
    np.testing.assert_array_equal(start.own, strategy.layout.pack(strategy.model.factors))


def test_an_evaluation_measures_the_model_that_is_exported(micro: Fixture, play: Fixture) -> None:
    run = play(micro("wire=flasc", "num_rounds=1"), splits=("test",))
    asked = [m for m in run.grid.sent if m.metadata.message_type == records.EVALUATE][-1]
    assert records.read_codec(asked, records.INSTRUCTION) == "float32"
    _, parts = records.read(asked, records.INSTRUCTION)
    np.testing.assert_array_equal(
        parts["adapter"], run.strategy.layout.pack(run.strategy.model.factors)
    )


def answering(codec: str, other: str, change: Callable[..., np.ndarray]) -> Callable[..., Message]:
    """Rewrite the answer of client 1, which is hosted alone; the others answer as they did."""

    def rewritten(asked: Message, infos: list, parts: dict[str, np.ndarray]) -> Message:
        if "1/adapter" not in parts:
            return Message(records.answer({"clients": infos}, parts, codec, 1), reply_to=asked)
        parts = {name: change(values) for name, values in parts.items()}
        return Message(records.answer({"clients": infos}, parts, other, 1), reply_to=asked)

    return rewritten


@pytest.mark.parametrize(
    ("wire", "codec", "match"),
    [
        ("float32", "bfloat16", "client 1: expected the codec float32, got bfloat16"),
        ("bfloat16", "float32", "client 1: expected the codec bfloat16, got float32"),
        ("int8", "float32", "client 1: expected the codec int8, got float32"),
        ("float32", "int8", "client 1: expected the codec float32, got int8"),
        ("int8", "int4", "client 1: expected the codec int8, got int4"),
    ],
)
def test_one_client_of_another_codec_is_dropped_and_named(
    wire: str,
    codec: str,
    match: str,
    micro: Fixture,
    play: Fixture,
    edge_grid: Fixture,
    spoil: Fixture,
) -> None:
    def cast(values: np.ndarray) -> np.ndarray:
        return np.zeros(values.size, np.float32 if codec in FLOAT_CODECS else np.uint8)

    config = micro(f"wire={wire}", "num_rounds=1", "runtime.num_nodes=4")
    run = play(config, grid=edge_grid(4, spoil(answering(wire, codec, cast))))
    (failure,) = run.run.records("failure")
    assert failure["reason"] == match
    assert [c["partition_id"] for c in run.run.records("client")] == [0, 2, 3]


@pytest.mark.parametrize("codec", LOSSY)
def test_an_update_of_another_size_is_dropped_and_named(
    codec: str, micro: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    config = micro(*BOTH[codec], "num_rounds=1", "runtime.num_nodes=4")
    short = answering(codec, codec, lambda values: values[:-4])
    run = play(config, grid=edge_grid(4, spoil(short)))
    (failure,) = run.run.records("failure")
    assert failure["reason"].startswith(f"client 1: codec {codec}: expected ")
    assert failure["reason"].endswith("(rank 4, side both)")
    assert [c["partition_id"] for c in run.run.records("client")] == [0, 2, 3]


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("part", ["adapter", "shared"])
def test_an_update_that_is_not_finite_is_its_clients_own_failure(
    codec: str, part: str, micro: Fixture, play: Fixture, played: Fixture, edge_grid: Fixture
) -> None:
    """A residual of NaN stands for training that went wrong: no codec turns it into numbers."""
    overrides = both_ways(codec, *(PROMPT if part == "shared" else ()))
    config = micro(*overrides, "num_rounds=1", "runtime.num_nodes=4")
    kind = "residual" if part == "shared" else "residual-both"
    [size] = {values.size for values in played(*overrides).strategy.start_values(1).values()}

    def poisoned(message: Message, context: Context) -> Message:
        body = records.read_body(message)
        if message.metadata.message_type == records.TRAIN and body["partition-ids"] == [1]:
            store = PersonalStore(context, body["run"], 4, kind)
            store.save(1, 0, np.full(size, np.nan, np.float32))
        return app(message, context)

    run = play(config, grid=edge_grid(4, client_app=poisoned))
    (failure,) = run.run.records("failure")
    assert failure["reason"] == (
        f"client 1, part {part}: codec {codec}: expected finite values, got nan at 0"
    )
    assert [c["partition_id"] for c in run.run.records("client")] == [0, 2, 3]
