from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.core import open_or_create
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.journal import Journal, open_ledger
from fedllm_flwr.runs.progress import Progress
from strategies.replayed import KIND, Replayed

Fixture = Callable[..., Any]
WITHOUT = ("unlearning=ledger", "unlearning.removed=[1]", "num_rounds=2")
REPLAY = (*WITHOUT, "unlearning.removal=replay", "unlearning.exactness=approximate")


@pytest.fixture(scope="module")
def plain(micro: Fixture, play: Fixture) -> Any:
    """Two rounds that never had client 1."""
    return play(micro(*WITHOUT))


def replayed(micro: Fixture, play: Fixture, plain: Any, folder: Path, factor: float = 1.0) -> Any:
    """The same, calibrated to the lengths of its own updates times a factor."""
    config, ledger = micro(*REPLAY), open_ledger(plain.run)
    run = open_or_create(config, folder)
    for server_round in ledger.rounds():
        for each in ledger.read(server_round).contributions:
            length = factor * float(np.linalg.norm(each.update.astype(np.float64)))
            run.append({"kind": KIND, "of_round": server_round, "partition_id": each.client,
                        "weight": each.weight, "length": length})  # fmt: skip
    return play(config, folder=folder)


def adapter(played: Any) -> np.ndarray:
    found: np.ndarray = played.strategy.checkpoint(2).arrays["adapter"]
    return found


def test_updates_that_have_their_old_lengths_give_the_plain_mean(
    micro: Fixture, play: Fixture, plain: Any, tmp_path: Path
) -> None:
    found = replayed(micro, play, plain, tmp_path / "run")
    np.testing.assert_allclose(
        adapter(found), adapter(plain), atol=1e-4
    )  # AdamW makes more of a last bit
    assert {r["partition_id"] for r in found.run.records("client")} == {0, 2, 3}


def test_shorter_old_lengths_give_a_shorter_way(
    micro: Fixture, play: Fixture, plain: Any, tmp_path: Path
) -> None:
    half = replayed(micro, play, plain, tmp_path / "run", 0.5)
    ways = []
    for played in (plain, half):
        ledger = open_ledger(played.run)
        lengths = [np.linalg.norm(c.update) for c in ledger.read(1).contributions]
        ways.append(np.mean(lengths))
    assert ways[0] == pytest.approx(ways[1]), (
        "the ledger has what clients sent, in equal first rounds"
    )
    start = plain.strategy.layout.pack(plain.strategy._first)
    assert np.linalg.norm(adapter(half) - start) < 0.7 * np.linalg.norm(adapter(plain) - start)


def test_without_old_lengths_there_is_nothing_to_replay(micro: Fixture, tmp_path: Path) -> None:
    config = micro(*REPLAY)
    journal = Journal(open_or_create(config, tmp_path / "run"), config, Progress(StringIO()))
    with pytest.raises(ConfigError, match="expected a run that action=unlearn has prepared"):
        Replayed(config, journal)
