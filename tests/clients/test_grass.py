"""What single messages of full-weight clients do; whole rounds are in tests/strategies."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.core import whole_json
from fedllm_flwr.grass.packing import indices_of
from fedllm_flwr.grass.rows import RowUpdate

Fixture = Callable[..., Any]


def backbone_digest(config: Any) -> str:
    model = open_workspace(whole_json(config)).backbone.model
    digest = hashlib.sha256()
    for _, weight in sorted(model.state_dict().items()):
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def answers(grid: Any, stage: str) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Infos and parts of the replies to messages of a stage."""
    asked: dict[str, Message] = {m.metadata.message_id: m for m in grid.sent}
    found = []
    for reply in grid.replies:
        message = asked[reply.metadata.reply_to_message_id]
        if records.read_body(message).get("stage") == stage:
            body, parts = records.read(reply, records.ANSWER)
            found += [(info, parts) for info in body["clients"]]
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method.sharing=local", "method.refresh_steps=1"),
        ("method.trainer=galore",),
        ("method.checkpointing=true",),
    ],
)
def test_the_shared_model_is_left_alone(
    overrides: tuple[str, ...], micro: Fixture, play: Fixture
) -> None:
    config = micro("method=fedgrass", "num_rounds=2", "evaluate_every=2", *overrides)
    before = backbone_digest(config)
    played = play(config, splits=("test",))
    assert played.strategy.changed
    assert played.run.records("failure") == []
    assert backbone_digest(config) == before


def test_checkpointing_changes_memory_and_not_results(micro: Fixture, play: Fixture) -> None:
    plain = play(micro("method=fedgrass", "num_rounds=1")).strategy.changed
    again = play(micro("method=fedgrass", "num_rounds=1", "method.checkpointing=true"))
    for name, update in again.strategy.changed.items():
        np.testing.assert_array_equal(update.indices, plain[name].indices)
        # Adam's division by small second moments makes rounding larger
        np.testing.assert_allclose(update.values, plain[name].values, rtol=0, atol=2e-4)


def test_a_client_sends_rows_of_its_own_only_where_it_picks_them(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    for sharing, sends in (("shared", False), ("local", True)):
        grid = edge_grid(2)
        play(micro("method=fedgrass", "num_rounds=1", f"method.sharing={sharing}"), grid=grid)
        told = [info for info, _ in answers(grid, "train")]
        assert len(told) == 4
        assert all(("rows" in info) == sends for info in told)
        for info in told if sends else ():
            for name, text in info["rows"].items():
                rows = indices_of(text, 64 if "q_proj" in name else 32, name)
                assert len(rows) == 4


def test_norms_are_those_of_the_model_that_the_round_begins_with(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid(2)
    play(micro("method=fedgrass", "num_rounds=2"), grid=grid)
    norms = [parts[f"{info['partition-id']}/norms"] for info, parts in answers(grid, "norms")]
    assert len(norms) == 2 * 4
    assert all((values >= 0).all() and values.sum() > 0 for values in norms)
    assert any((first != second).any() for first, second in zip(norms[:4], norms[4:], strict=True))


def test_what_is_evaluated_is_the_backbone_with_its_changed_rows(
    micro: Fixture, play: Fixture
) -> None:
    config = micro("method=fedgrass", "num_rounds=1", "evaluate_every=1")
    played = play(config, splits=("test",))
    first, last = (r["loss"] for r in played.run.records("round"))
    assert first != last
    for name, update in played.strategy.changed.items():
        zero = np.zeros_like(update.values)
        played.strategy.changed[name] = RowUpdate(update.indices, zero)
    played.strategy._complete(played.grid, 9, 60.0, 9, played.result, {})
    assert played.run.records("round")[-1]["loss"] == pytest.approx(first, abs=1e-6)
