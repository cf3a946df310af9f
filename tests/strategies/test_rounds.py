import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedllm_flwr import records
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import partition
from fedllm_flwr.training.evaluate import EvalSums
from strategies import Hosting, build_strategy
from strategies.baselines import Recorder
from strategies.sampling import draw_cohort
from strategies.tally import Tally

Fixture = Callable[..., Any]


def sums(correct: int, total: int, loss: float, tokens: int, characters: int) -> dict[str, Any]:
    return {
        "correct": correct,
        "total": total,
        "loss_sum": loss,
        "label_tokens": tokens,
        "characters": characters,
    }


def test_figures_are_of_the_pooled_rows_and_not_means_of_means() -> None:
    tally = Tally()
    tally.add(sums(1, 2, 2.0, 2, 10))
    tally.add(sums(8, 8, 4.0, 10, 30))
    assert tally.figures("classification") == {"accuracy": 0.9, "loss": 0.5}
    bits = 6.0 / math.log(2) / 40
    assert tally.figures("instruction") == pytest.approx({"loss": 0.5, "bits_per_character": bits})


def test_figures_of_nothing_are_absent() -> None:
    assert Tally().figures("classification") == {}
    assert Tally().figures("instruction") == {}


def test_rows_without_labels_have_a_loss_and_bits_all_the_same() -> None:
    tally = Tally()
    tally.add(sums(0, 0, math.log(2) * 40, 20, 40))
    assert tally.figures("instruction") == pytest.approx(
        {"loss": math.log(2) * 2, "bits_per_character": 1.0}
    )


def test_a_tally_has_the_fields_of_a_clients_sums() -> None:
    assert list(Tally.__dataclass_fields__) == list(EvalSums.__dataclass_fields__)


@pytest.fixture(scope="module")
def five(micro: Fixture, play: Fixture) -> Any:
    """Five rounds, half of the clients in each, evaluated every second round."""
    config = micro(
        "num_rounds=5", "evaluate_every=2", "strategy.cohort_fraction=0.5", "client.local_steps=1"
    )
    return play(config, splits=("validation", "test"))


def test_cohorts_are_those_of_the_seed(five: Any) -> None:
    for record in five.run.records("round")[1:]:
        expected = draw_cohort(0, record["round"], range(4), 0.5)
        assert record["cohort"] == expected
        trained = [
            c["partition_id"] for c in five.run.records("client") if c["round"] == record["round"]
        ]
        assert trained == expected
    started = [(s["round"], s["cohort_size"]) for s in five.run.records("started")]
    assert started == [(r, 2) for r in range(1, 6)]


def test_all_clients_are_evaluated_when_it_is_due_and_at_the_end(five: Any) -> None:
    rounds = five.run.records("round")
    assert [r["round"] for r in rounds] == [0, 1, 2, 3, 4, 5]
    due = [r["round"] for r in rounds if "accuracy" in r]
    assert due == [0, 2, 4, 5]
    assert sorted(five.result.evaluate_metrics_clientapp) == due
    seen = {(e["round"], e["partition_id"], e["split"]) for e in five.run.records("evaluation")}
    assert seen == {(r, p, s) for r in due for p in range(4) for s in ("validation", "test")}


def test_a_rounds_figures_are_the_sums_of_its_clients(five: Any) -> None:
    last = five.run.records("round")[-1]
    own = [e for e in five.run.records("evaluation") if e["round"] == 5 and e["split"] == "test"]
    correct, total = sum(e["correct"] for e in own), sum(e["total"] for e in own)
    assert total == 12
    assert last["accuracy"] == correct / total
    assert last["loss"] == pytest.approx(sum(e["loss_sum"] for e in own) / total)
    assert last["worst_client_accuracy"] == min(
        e["correct"] / e["total"] for e in own if e["total"]
    )
    trained = [c for c in five.run.records("client") if c["round"] == 5]
    weights = [c["num_examples"] for c in trained]
    mean = np.average([c["loss"] for c in trained], weights=weights)
    assert last["train_loss"] == pytest.approx(mean)
    assert last["num_examples"] == sum(weights)
    metrics = five.result.train_metrics_clientapp[5]
    assert isinstance(metrics, MetricRecord)
    assert metrics["train-loss"] == last["train_loss"]


def test_round_zero_is_the_plain_model(five: Any) -> None:
    first = five.run.records("round")[0]
    assert "train_loss" not in first
    assert first["loss"] > five.run.records("round")[-1]["loss"], "training lowers the loss"


def test_weights_are_the_numbers_of_training_rows(five: Any) -> None:
    config = five.strategy.config
    clients = partition(load_task(config.task.options(""), 0), config.partition, 0)
    for record in five.run.records("client"):
        assert record["num_examples"] == len(clients[record["partition_id"]].train)
    assert len({len(client.train) for client in clients}) > 1, "equal weights would prove nothing"


def test_uniform_weighting_differs_from_weighting_by_examples(
    micro: Fixture, play: Fixture
) -> None:
    one = play(micro("num_rounds=1"))
    uniform = play(micro("num_rounds=1", "strategy.weighting=uniform"))
    assert one.sha != uniform.sha
    mean = np.mean(flats(uniform), axis=0)
    held = uniform.strategy.layout.pack(uniform.strategy.model.factors)
    np.testing.assert_allclose(held, mean, rtol=0, atol=1e-6)


def flats(played: Any) -> list[np.ndarray]:
    return [
        values.astype(np.float64)
        for reply in played.grid.replies
        if reply.metadata.message_type == records.TRAIN
        for values in records.read(reply, records.ANSWER)[1].values()
    ]


def test_arguments_of_start_win_over_the_configuration(micro: Fixture, edge_grid: Fixture) -> None:
    seen: list[tuple[int, float]] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((server_round, float(np.abs(arrays["adapter"].numpy()).sum())))
        return MetricRecord({"norm": seen[-1][1]})

    grid, observer = edge_grid(2), Recorder(print)
    hosting = Hosting(grid, 1.0, print, observer.count)
    strategy = build_strategy(micro("num_rounds=1"), hosting, observer, task_kind="classification")
    strategy.evaluated_splits = ()
    hosting.refresh()
    result = strategy.start(grid, num_rounds=2, evaluate_fn=evaluate)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert [server_round for server_round, _ in seen] == [1, 2]
    assert result.evaluate_metrics_serverapp[2]["norm"] == seen[1][1]
    assert seen[0][1] != seen[1][1]


def test_the_deadline_of_a_round_is_the_configurations(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    timeouts = []

    class Timed(edge_grid):  # type: ignore[misc, valid-type]
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            timeouts.append(timeout)
            return super().send_and_receive(messages, timeout=timeout)

    play(micro("num_rounds=1", "strategy.round_timeout_seconds=7"), grid=Timed())
    assert timeouts[0] == 120.0, "the first question to the nodes has its own"
    assert all(0 < t <= 7 for t in timeouts[1:])


def test_a_round_that_nobody_answers_in_time_is_retried_and_then_given_up(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    grid = edge_grid(
        2, lambda asked, replies: [] if asked[0].metadata.message_type == "train" else replies
    )
    config = micro("strategy.max_retries=2", "strategy.min_fraction=0.25")
    expected = (r"round 1: 0 of 4 clients gave a good reply in 3 attempts; "
                r"strategy\.min_fraction=0\.25 asks for 1")  # fmt: skip
    with pytest.raises(RunStoppedError, match=expected):
        play(config, grid=grid)
    assert len([m for m in grid.sent if m.metadata.message_type == "train"]) == 6


def test_it_is_a_strategy_of_flowers(five: Any) -> None:
    assert isinstance(five.strategy, Strategy)
    five.strategy.summary()
