import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients.prompt import first_personal
from fedllm_flwr import records
from strategies.fedprompt import first_parts

Fixture = Callable[..., Any]
PROMPT = "method=fedprompt"


@pytest.fixture
def ask(edge_grid: Fixture) -> Callable[..., Any]:
    """Send one message to the only node of a grid and read the reply; the grid keeps its context."""

    def asked(
        config: Any,
        kind: str,
        clients: list[int],
        grid: Any = None,
        server_round: int = 1,
        **body: Any,
    ) -> Any:
        grid = grid or edge_grid(1)
        own = {name.replace("_", "-"): value for name, value in body.items()}
        given = (
            {"learning-rate": config.optimizer.learning_rate}
            if kind == records.TRAIN
            else {"splits": ["test"]}
        )
        common = {"config": json.loads(config.to_json()), "fingerprint": config.fingerprint(),
                  "partition-ids": clients, "server-round": server_round, "run": "r"}  # fmt: skip
        parts = {"shared": first_parts(config)["shared"]}
        content = records.instruction(common | given | own, parts, "float32")
        (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
        assert reply.has_content(), reply.error
        found, arrays = records.read(reply, records.ANSWER)
        return found["clients"], arrays

    return asked


def test_a_reply_has_the_shared_prompt_and_nothing_personal(micro: Fixture, ask: Fixture) -> None:
    config = micro(PROMPT, "method.personal_length=2")
    infos, parts = ask(config, records.TRAIN, [2, 0])
    assert list(parts) == ["2/shared", "0/shared"]
    assert [info["partition-id"] for info in infos] == [2, 0]
    assert {part.size for part in parts.values()} == {first_parts(config)["shared"].size}


def test_alternating_training_moves_both_parts_in_twice_the_steps(
    micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    found = {}
    for training in ("joint", "alternating"):
        config = micro(PROMPT, "method.personal_length=2", f"method.local_training={training}")
        grid = edge_grid(1)
        infos, parts = ask(config, records.TRAIN, [0], grid)
        own = grid.contexts[1000].state["personal/0"]["1"].numpy()
        start = first_personal(config.method, first_parts(config)["shared"])
        assert np.abs(own - start).max() > 1e-4
        assert np.abs(parts["0/shared"] - first_parts(config)["shared"]).max() > 1e-4
        found[training] = infos[0]["steps"]
    assert found == {"joint": 2, "alternating": 4}


def test_a_personal_prompt_begins_at_the_mean_of_the_shared_one_or_at_zero(micro: Fixture) -> None:
    shared = np.arange(12, dtype=np.float32)
    mean = micro(PROMPT, "method.personal_length=2").method
    np.testing.assert_array_equal(first_personal(mean, shared), np.tile([4.0, 5.0, 6.0, 7.0], 2))
    zero = micro(PROMPT, "method.personal_length=2", "method.personal_start=zero").method
    np.testing.assert_array_equal(first_personal(zero, shared), np.zeros(8))


def test_what_a_client_has_learned_for_itself_serves_itself(
    micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    config = micro(
        PROMPT, "method.personal_length=2", "optimizer.learning_rate=0.1", "client.local_steps=12"
    )
    grid = edge_grid(1)
    before = ask(config, records.EVALUATE, [0, 1], grid, splits=["train"])[0]
    ask(config, records.TRAIN, [0], grid)
    after = ask(config, records.EVALUATE, [0, 1], grid, splits=["train"])[0]
    losses = [[c["splits"]["train"]["loss_sum"] for c in infos] for infos in (before, after)]
    assert losses[1][0] < losses[0][0]
    assert losses[1][1] == losses[0][1], "client 1 has not trained"


def test_tuning_is_measured_and_thrown_away(
    micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    config = micro(PROMPT, "method.personal_length=2")
    grid = edge_grid(1)
    tune = {"tune_steps": 12, "learning_rate": 0.1}
    plain = ask(config, records.EVALUATE, [0], grid, splits=["train"])[0][0]["splits"]["train"]
    tuned = ask(config, records.EVALUATE, [0], grid, splits=["train"], **tune)[0][0]["splits"][
        "train"
    ]
    assert tuned["loss_sum"] < plain["loss_sum"]
    again = ask(config, records.EVALUATE, [0], grid, splits=["train"])[0][0]["splits"]["train"]
    assert again == plain
    assert len(grid.contexts[1000].state) == 0


def test_without_a_prompt_it_is_the_plain_model(micro: Fixture, play: Fixture) -> None:
    lora = play(micro("num_rounds=1", "task.template=read"))
    prompt = play(micro(PROMPT, "num_rounds=1"))
    found = []
    for played in (lora, prompt):
        strategy = played.strategy
        strategy.plain, strategy.evaluated_splits = True, ("test",)
        sent = strategy.configure_evaluate(0, strategy.arrays(), None, played.grid)
        assert all("arrays" not in m.content for m in sent)
        replies = played.grid.send_and_receive(sent)
        found.append([records.read(r, records.ANSWER)[0] for r in replies])
    assert found[0] == found[1]


def test_a_client_without_gradients_reports_its_queries(micro: Fixture, ask: Fixture) -> None:
    config = micro(PROMPT, "method.trainer=black_box", "method.search_dimension=4",
                   "method.search_population=4", "method.search_generations=3")  # fmt: skip
    infos, parts = ask(config, records.TRAIN, [0, 1])
    assert [info["queries"] for info in infos] == [13, 13], "the start, and 3 generations of 4"
    assert set(parts) == {"0/shared", "1/shared"}


def test_a_message_without_a_part_is_said_by_each_client(
    micro: Fixture, edge_grid: Fixture
) -> None:
    config = micro(PROMPT)
    common = {"config": json.loads(config.to_json()), "fingerprint": config.fingerprint(), "run": "r",
              "partition-ids": [0, 1], "server-round": 1, "learning-rate": 0.1}  # fmt: skip
    content = records.instruction(common, {"other": np.ones(3, np.float32)}, "float32")
    (reply,) = edge_grid(1).send_and_receive([Message(content, 1000, records.TRAIN)])
    found, arrays = records.read(reply, records.ANSWER)
    assert arrays == {}
    for client, info in enumerate(found["clients"]):
        assert info["error"] == f"client {client}: expected the part 'shared', got ['other']"


def test_a_client_whose_own_state_is_damaged_fails_alone_and_names_no_path(
    micro: Fixture, ask: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro(PROMPT, "method.personal_length=2")
    folder = tmp_path / "hospital-7" / "r" / "0"
    folder.mkdir(parents=True)
    (folder / "round-1.f32").write_bytes(b"odd")
    grid = edge_grid(1, node_config={"state-path": str(tmp_path / "hospital-7")})
    infos, parts = ask(config, records.TRAIN, [0, 1], grid, server_round=2, run="r")
    assert set(parts) == {"1/shared"}
    assert infos[0]["error"] == "client 0: start failed (ValueError); the node's log says why"
    assert infos[1]["error"] == ""


def test_personal_prompts_of_another_run_are_not_read(
    micro: Fixture, ask: Fixture, edge_grid: Fixture
) -> None:
    config = micro(PROMPT, "method.personal_length=2")
    grid = edge_grid(1)
    first = ask(config, records.TRAIN, [0], grid, run="one")[0]
    again = ask(config, records.TRAIN, [0], grid, server_round=2, run="one")[0]
    other = ask(config, records.TRAIN, [0], grid, server_round=2, run="two")[0]
    assert [infos[0]["personal"] for infos in (first, again, other)] == ["new", "kept", "new"]
