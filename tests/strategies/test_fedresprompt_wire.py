"""What of the split method crosses the wire: a closed list, and not a byte of what shall stay."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients.personal import PersonalStore
from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.core import whole_json
from fedllm_flwr.costs import (
    ModelShape,
    SplitSizes,
    controller_parameters,
    exchange_bytes,
    full_row,
)
from fedllm_flwr.privacy import single_release_epsilon
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.training.batches import plan_steps
from fedllm_flwr.training.settings import LocalSettings

Fixture = Callable[..., Any]
METHOD = "method=fedresprompt"
MODES = ("fedavg_controller", "sync_sgd", "label_private", "private_controller")
LM = "method.server_model=lm"
TRAINING = (records.TRAIN, records.EXCHANGE)


def of(mode: str) -> str:
    return f"method.mode={mode}"


COMMON = {"config", "fingerprint", "server-round", "partition-ids", "run"}
STEP = COMMON | {"learning-rate", "stage", "exchange"}
DOWN = {
    "query.describe": set(),
    "train": COMMON | {"learning-rate"},
    "train.exchange": STEP,
    "evaluate": COMMON | {"splits", "template"},
    "evaluate.score": COMMON | {"splits"},
}
PARTS_DOWN = {
    "fedavg_controller": {"controller", "gradient"},
    "sync_sgd": {"controller", "gradient"},
    "label_private": {"controller", "gradient", "logits", "validation", "test"},
    "private_controller": {"controller", "gradient"},
}
PARTS_UP = {
    "fedavg_controller": {"prompts", "controller", "validation", "test"},
    "sync_sgd": {"prompts", "controller-gradient", "validation", "test"},
    "label_private": {"prompts", "slope", "controller", "validation", "test"},
    "private_controller": {"prompts", "controller", "validation", "test"},
}
FIGURES = {"num-examples", "steps", "tokens", "cpu-seconds"}
LEAKS = {"energy-share", "reconstruction-r2"}
SAID = {"partition-id", "error", "rows", "reservoir", "splits"} | FIGURES | LEAKS


@pytest.mark.parametrize("mode", MODES)
def test_what_crosses_is_a_closed_list(mode: str, micro: Fixture, play: Fixture) -> None:
    played = play(micro(METHOD, of(mode)), splits=("validation", "test"))
    down: set[str] = set()
    for message in played.grid.sent:
        body, parts = records.read(message, records.INSTRUCTION)
        assert set(body) == DOWN[message.metadata.message_type]
        down |= {name.rpartition("/")[2] for name in parts}
    up: set[str] = set()
    said: set[str] = set()
    facts: set[str] = set()
    for reply in played.grid.replies:
        body, parts = records.read(reply, records.ANSWER)
        up |= {name.rpartition("/")[2] for name in parts}
        for info in body.get("clients", []):
            said |= set(info)
            for split in info.get("splits", {}).values():
                facts |= set(split)
    assert down == PARTS_DOWN[mode]
    assert up == PARTS_UP[mode]
    if mode == "label_private":
        sums = {"correct", "total", "loss_sum", "label_tokens", "characters"}
        assert said == SAID | {"loss"}
        assert facts == sums | {"rows"}
    else:
        private = {"private-matrix"} if mode == "private_controller" else set()
        assert said == SAID | {"targets"} | private
        assert facts == {"rows", "targets", "characters"}


def test_no_text_leaves_a_client_unless_the_option_says_so(
    micro: Fixture, play: Fixture, wire_bytes: Fixture
) -> None:
    for text, crosses in (("none", False), ("prompt_before", True)):
        overrides = (LM, f"method.server_text={text}", "num_rounds=1", "client.local_steps=9")
        played = play(micro(METHOD, *overrides))
        everything = b"".join(wire_bytes(m) for m in played.grid.replies)
        work = open_workspace(whole_json(played.strategy.config))
        row = work.rows(0).train[0]
        tokens = json.dumps(work.encoder().encode([row])[0].input_ids.tolist()).encode()
        assert (tokens in everything) == crosses
        assert row.text.encode() not in everything


def test_a_private_matrix_is_in_no_message(
    micro: Fixture, play: Fixture, wire_bytes: Fixture
) -> None:
    played = play(micro(METHOD, of("private_controller")))
    spec = played.strategy.spec
    assert played.strategy.controller.size == spec.readout_values < spec.size
    stores = [PersonalStore(c, played.strategy.run) for c in played.grid.contexts.values()]
    own = [stores[p % 2].load(p, before) for p in range(4) for before in (3, 9)]
    start = spec.start(derive_seed(played.strategy.config.seed, "controller")).numpy()
    everything = b"".join(wire_bytes(m) for m in (*played.grid.sent, *played.grid.replies))
    shared = records.read(played.grid.sent[-1], records.INSTRUCTION)[1]
    some = next(iter(shared.values()))
    assert some[:4].tobytes() in everything, "the search finds what does cross"
    for values in own:
        assert values is not None
        assert np.abs(values - start[spec.readout_values :]).max() > 1e-4
        for first in range(0, values.size, 4):
            assert values[first : first + 4].tobytes() not in everything


@pytest.mark.parametrize("mode", MODES)
def test_no_session_outlives_its_round(mode: str, micro: Fixture, play: Fixture) -> None:
    played = play(micro(METHOD, of(mode)))
    for context in played.grid.contexts.values():
        assert not [name for name in context.state if name.startswith("session")]


SIZES = SplitSizes(prompt_tokens=2, code_size=4, reservoir_size=20, input_size=6, classes=4)
"""Those of the smallest split run; its model is 64 wide."""
SHAPE = ModelShape(64, 2, "tiny")


def array_bytes(messages: list[Message]) -> int:
    """Bytes of the values in messages of training, as they are stored."""
    arrays = [m.content["arrays"]["flat"] for m in messages if "arrays" in m.content]
    return sum(array.numpy().nbytes for array in arrays)


@pytest.mark.parametrize("mode", ["fedavg_controller", "label_private", "private_controller"])
def test_the_formulas_bytes_are_the_ledgers(mode: str, micro: Fixture, play: Fixture) -> None:
    """Without headers and target ids, which are text in them; the server keeps losses, so none goes down."""
    played = play(micro(METHOD, of(mode), "num_rounds=1", "runtime.num_nodes=4"))
    grid, run = played.grid, played.run
    sent = [m for m in grid.sent if m.metadata.message_type in TRAINING]
    replies = [m for m in grid.replies if m.metadata.message_type in TRAINING]
    cost = exchange_bytes(SHAPE, SIZES, label_private=mode == "label_private")
    private = mode == "private_controller"
    values = SIZES.code_size * SIZES.state_size if private else controller_parameters(SHAPE, SIZES)
    clients = run.records("client")
    rows = sum(c["tokens"] for c in clients) // SIZES.prompt_tokens
    assert len(clients) == 4
    assert rows == sum(
        np.concatenate(step).size
        for c in clients
        for step in plan_steps(c["num_examples"], LocalSettings(batch_size=4, local_steps=2), 0)
    )
    up = rows * (cost.up - cost.target_up) + len(clients) * 4 * values
    down = rows * (cost.down - cost.loss_down) + len(clients) * 4 * values
    assert (array_bytes(replies), array_bytes(sent)) == (up, down)
    if not private:
        whole = full_row(SHAPE, SIZES)
        assert 2 * 4 * values == whole.controller_round_bytes
    counted = {r["direction"]: r["bytes"] for r in run.records("bytes") if r["message"] == "train"}
    for direction, messages, least in (("uplink", replies, up), ("downlink", sent, down)):
        headers = sum(records.serialized_bytes(without_arrays(m)) for m in messages)
        arrays = counted[direction] - headers
        assert 0 <= arrays - least <= 1024 * len(messages), "names and shapes of the arrays"


def without_arrays(message: Message) -> Message:
    twin = deepcopy(message)
    twin.content.pop("arrays", None)
    return twin


def test_the_ledger_has_every_message(micro: Fixture, play: Fixture) -> None:
    played = play(micro(METHOD, "num_rounds=1"))
    sent = [m for m in played.grid.sent if m.metadata.message_type in TRAINING]
    down = [r for r in played.run.records("bytes") if r["message"] == "train"]
    counted = {r["direction"]: (r["messages"], r["bytes"]) for r in down}
    assert counted["downlink"][0] == counted["uplink"][0] == len(sent)
    assert counted["downlink"][1] == sum(records.serialized_bytes(m) for m in sent)


# What a client says of itself ---------------------------------------------------------------------------------------


def test_the_records_say_what_prompts_give_away(micro: Fixture, play: Fixture) -> None:
    series = ("task=level_routing", "method.reservoir_size=60", "partition=iid")
    noise = ("method.clip_norm=1", "method.noise_multiplier=8")
    plain, noised = (play(micro(METHOD, *series, *more), splits=("validation", "test"))
                     for more in ((), noise))  # fmt: skip
    first, last = plain.run.records("round")[0], plain.run.records("round")[-1]
    assert first["reconstruction_r2"] > 0.9, "a level is in the code"
    assert 0 < first["state_energy_share"] == last["state_energy_share"] < 1
    assert "prompt_epsilon" not in last
    lines = [r for r in plain.run.records("leak") if r["round"] == 0]
    assert [r["partition_id"] for r in lines] == [0, 1, 2, 3]
    assert np.mean([r["reconstruction_r2"] for r in lines]) == first["reconstruction_r2"]
    _, last = (noised.run.records("round")[i] for i in (0, -1))
    assert last["reconstruction_r2"] < 0.5
    assert min(c["num_examples"] for c in noised.run.records("client")) == 9
    sends = 3 * 1  # two steps of 4 of at least 9 rows are less than an epoch
    assert last["prompt_epsilon"] == single_release_epsilon(8.0, max(2, sends), 1e-5)
    assert last["prompt_delta"] == 1e-5


def test_the_account_goes_on_after_a_resume(micro: Fixture, play: Fixture, tmp_path: Path) -> None:
    config = micro(METHOD, "method.clip_norm=1", "method.noise_multiplier=4", "keep_checkpoints=9")
    whole = play(config, splits=("test",))
    folder = tmp_path / "run"
    shutil.copytree(whole.run.path, folder)
    for later in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"round-{later:04d}")
    again = play(config, folder=folder, splits=("test",))
    ends = [p.run.records("round")[-1]["prompt_epsilon"] for p in (whole, again)]
    assert ends[0] == ends[1] > whole.run.records("round")[0]["prompt_epsilon"]


def test_a_lost_private_matrix_is_announced(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    config = micro(METHOD, of("private_controller"))
    assert not play(config).run.records("event")
    forgotten: list[int] = []

    def forgetful(asked: list[Message], replies: list[Message]) -> list[Message]:
        """The first node comes back without its state after round 1."""
        body = records.read_body(asked[0])
        if body.get("stage") == "gradient" and body["server-round"] == 1:
            done = all(
                "controller" in " ".join(records.read(r, records.ANSWER)[1]) for r in replies
            )
            if done and not forgotten:
                context = grid.contexts[min(grid.contexts)]
                for name in [n for n in context.state if n.startswith("personal")]:
                    del context.state[name]
                    forgotten.append(1)
        return replies

    grid = edge_grid(2, forgetful, node_config={"state-path": ""})
    events = [e["text"] for e in play(config, grid=grid).run.records("event")]
    assert forgotten
    lost = {f"client {p} has lost its private matrix P" for p in (0, 2)}
    assert {text.partition(" and begins")[0] for text in events} == lost
    assert len(events) == 2
