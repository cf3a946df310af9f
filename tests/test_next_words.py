from dataclasses import replace

import numpy as np
import pytest

from fedllm_flwr.cascade.curves import Walk
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.next_words import arrival_rows, batch_costs, word_rows
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.tasks.base import Row, Task, Template
from fedllm_flwr.tiers import Computing, Endpoint, LocalMember, Tier
from fedllm_flwr.tiers.members import Asking, said

TEMPLATE = Template("type", "{text}")
TEXTS = ("turn on the", "switch off", "how warm is", "set a timer for")


def task_of(rows: tuple[Row, ...]) -> Task:
    return Task("keyboard", "instruction", {"train": (), "validation": (), "test": rows}, (), (), (TEMPLATE,),
                one_word=True)  # fmt: skip


@pytest.fixture(scope="module")
def tier() -> Tier:
    config = TierConfig(name="small", members=(MemberConfig(model="tiny"),), max_new_tokens=5)
    member = LocalMember(
        "tiny", ModelRef("tiny"), max_tokens=32, computing=Computing("float32", "cpu")
    )
    return Tier(config, (member,))


def rows_whose_targets_are(tier: Tier, rank: int) -> tuple[Row, ...]:
    """Rows whose right word is the model's own suggestion of a rank."""
    asked = tuple(Row(f"q{k}", text, "?", None, "ab"[k % 2]) for k, text in enumerate(TEXTS))
    replies = tier.members[0].ask(task_of(asked), asked, Asking(max_new_tokens=5, first_rank=rank))
    return tuple(
        replace(row, target=own[0].text or "?") for row, own in zip(asked, replies, strict=True)
    )


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_word_counts_where_it_is_suggested(tier: Tier, rank: int) -> None:
    rows = rows_whose_targets_are(tier, rank)
    found = {r["group"]: r for r in word_rows([tier], task_of(rows), rows, lambda _: None)}
    assert set(found) == {"a", "b", "all"}
    assert found["all"]["queries"] == 4 == 2 * found["a"]["queries"]
    if rank == 0:
        assert found["all"]["top1"] == 1.0
    if rank < 3:
        assert found["all"]["top3"] == 1.0
    assert found["all"]["top1"] <= found["all"]["top3"]


def test_suggestions_of_other_ranks_are_other_words(tier: Tier) -> None:
    first, second = (rows_whose_targets_are(tier, rank) for rank in (0, 1))
    assert [row.target for row in first] != [row.target for row in second]
    (row,) = [
        r for r in word_rows([tier], task_of(second), second, lambda _: None) if r["group"] == "all"
    ]
    assert row["top1"] < 1.0


def test_the_first_word_is_the_answer() -> None:
    task = task_of(())
    assert said("  kitchen light\nand", task) == "kitchen"
    assert said(" \n", task) is None
    assert said(" kitchen light ", replace(task, one_word=False)) == "kitchen light"


def test_an_endpoint_has_no_second_guess() -> None:
    members = (MemberConfig(base_url="http://x", model="m"),)
    tier = Tier(TierConfig(name="far", members=members), (Endpoint("m", "http://x", "m"),))
    rows = (Row("q", "turn", "on", None, "en"),)
    with pytest.raises(ConfigError, match="got the endpoint m"):
        word_rows([tier], task_of(rows), rows, lambda _: None)


def test_batches_are_measured_in_cpu_seconds(tier: Tier) -> None:
    rows = tuple(Row(f"q{k}", f"turn on {k}", "?", None, "en") for k in range(9))
    found = batch_costs(tier, task_of(rows), rows)
    assert list(found) == [1, 8]
    assert all(seconds > 0 for seconds in found.values())


def test_what_devices_answer_does_not_queue() -> None:
    """5 % deferred: the median is a device's own time, the tail is the server's, and the server is nearly idle."""
    answered = (np.arange(100) % 20 == 0).astype(np.int64)
    walk = Walk(np.ones((100, 2), bool), answered)
    cascade, last = arrival_rows(walk, {1: 0.02}, {1: 0.2, 8: 0.6, 32: 2.0}, 10.0, 0)
    assert cascade["p50_seconds"] == pytest.approx(0.02)
    assert cascade["p99_seconds"] > 0.02 + 0.1 + 0.2 - 1e-9, (
        "its own time, the wait for others, and a batch"
    )
    assert last["p50_seconds"] > 0.3 > cascade["p50_seconds"]
    assert cascade["server_busy"] < 0.3 < last["server_busy"] <= 1.0
    nothing = arrival_rows(Walk(walk.paid, np.zeros(100, np.int64)), {1: 0.02}, {1: 0.2}, 10.0, 0)[
        0
    ]
    assert (nothing["p99_seconds"], nothing["server_busy"]) == (pytest.approx(0.02), 0.0)
