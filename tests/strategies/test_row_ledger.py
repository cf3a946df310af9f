import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import sum_epsilon, sum_rdp_epsilon
from fedllm_flwr.settings.accounts import noised_steps
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.private import plan_private
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy
from strategies.row_ledger import RowLedger, check_row_budget

Fixture = Callable[..., Any]
ROWS = (
    "privacy=sample",
    "privacy.noise_multiplier=2",
    "client.clip_norm=0",
    "client.batch_size=2",
    "client.local_epochs=1",
    "client.local_steps=0",
)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "extra", [(), ("client.local_epochs=0", "client.local_steps=5"), ("client.local_epochs=3",)]
)
def test_the_account_has_the_steps_that_training_takes(
    num_rows: int, extra: tuple[str, ...], micro: Fixture
) -> None:
    client = micro(*ROWS, "client.gradient_accumulation=2", *extra).client
    rows = [Encoded("row", [1, 2, 3], [2], [0], 0, 3) for _ in range(num_rows)]
    settings = LocalSettings(
        batch_size=client.batch_size,
        gradient_accumulation=client.gradient_accumulation,
        local_epochs=max(1, client.local_epochs),
        local_steps=client.local_steps,
        sample_privacy=SamplePrivacy(clip_norm=1.0, noise_multiplier=2.0),
    )
    releases = plan_private(rows, settings, np.random.default_rng(0)).releases
    assert noised_steps(client, num_rows) == (releases.sampling_rate, releases.steps)


def test_the_epsilon_is_that_of_the_client_whose_rows_have_it_worst(
    micro: Fixture, paper: Any
) -> None:
    ledger = RowLedger(micro(*ROWS), paper)
    assert ledger.epsilon() is None
    ledger.ask(1, [0, 1])
    assert paper.written[-1]["epsilon"] is None, "nobody has said how many rows it has"
    ledger.learn(1, {0: 4, 1: 20})
    few, many = sum_epsilon(2.0, 2, 1e-5, 0.5), sum_epsilon(2.0, 10, 1e-5, 0.1)
    assert ledger.epsilon() == max(few, many) == paper.written[-1]["epsilon"]
    ledger.ask(2, [1])
    assert ledger.epsilon() == max(few, sum_epsilon(2.0, 20, 1e-5, 0.1))
    ledger.ask(2, [1])
    assert ledger.epsilon() == max(few, sum_epsilon(2.0, 30, 1e-5, 0.1)), (
        "asked again is given again"
    )


def test_a_ledger_goes_on_from_what_was_written(micro: Fixture, paper: Any) -> None:
    first = RowLedger(micro(*ROWS), paper)
    first.ask(1, [0, 1])
    first.learn(1, {0: 4, 1: 20})
    first.ask(2, [0, 1])
    again = RowLedger(micro(*ROWS), paper)
    assert again.epsilon() == first.epsilon()


@pytest.mark.parametrize(("clients", "of"), [(16, sum_epsilon), (17, sum_rdp_epsilon)])
def test_many_clients_are_bounded_by_renyi_divergences(
    clients: int, of: Callable[..., float], micro: Fixture, paper: Any
) -> None:
    ledger = RowLedger(micro(*ROWS), paper)
    rows = {p: 10 + p for p in range(clients)}
    ledger.ask(1, list(rows))
    ledger.learn(1, rows)
    expected = max(
        of(2.0, steps, 1e-5, rate)
        for rate, steps in (noised_steps(micro(*ROWS).client, n) for n in rows.values())
    )
    assert ledger.epsilon() == expected


def test_a_client_whose_answers_are_lost_is_charged_as_the_others(
    micro: Fixture, paper: Any
) -> None:
    two, four = (sum_epsilon(2.0, steps, 1e-5, 0.5) for steps in (4, 8))
    budget = (f"privacy.epsilon_budget={(two + four) / 2}", "strategy.max_retries=0")
    ledger = RowLedger(micro(*ROWS, *budget), paper)
    ledger.ask(1, [0, 1])
    ledger.learn(1, {0: 4})
    ledger.ask(2, [1])
    assert ledger.epsilon() == two
    ledger.ask(3, [1])
    ledger.ask(4, [1])
    assert ledger.epsilon() == four
    assert ledger.is_spent()
    ledger.learn(4, {1: 20})
    assert ledger.epsilon() == max(sum_epsilon(2.0, 40, 1e-5, 0.1), sum_epsilon(2.0, 2, 1e-5, 0.5))


def test_what_a_round_may_cost_is_the_budget_itself(micro: Fixture, paper: Any) -> None:
    two = sum_epsilon(2.0, 4, 1e-5, 0.5)
    config = micro(*ROWS, f"privacy.epsilon_budget={two!r}", "strategy.max_retries=0")
    ledger = RowLedger(config, paper)
    ledger.ask(1, [0])
    ledger.learn(1, {0: 4})
    assert not ledger.is_spent()
    ledger.ask(2, [0])
    assert ledger.is_spent()
    one = sum_epsilon(2.0, 2, 1e-5, 0.5)
    assert one < sum_rdp_epsilon(2.0, 2, 1e-5, 0.5)
    check_row_budget(
        micro(*ROWS, f"privacy.epsilon_budget={one!r}", "strategy.max_retries=0"), [4, 0]
    )


def test_a_retry_is_charged_and_steps_that_the_account_lacks_are_refused(
    micro: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    seen: list[int] = []

    def hurried(asked: Any, infos: list[dict[str, Any]], parts: dict[str, Any]) -> None:
        for info in infos:
            if info["partition-id"] == 1 and not seen:
                seen.append(info["steps"])
                info["steps"] += 1

    config = micro(*ROWS, "num_rounds=1", "strategy.max_retries=1", "strategy.min_fraction=1")
    played = play(config, grid=edge_grid(2, spoil(hurried)))
    [failure] = played.run.records("failure")
    assert f"client 1: expected {seen[0]} noised steps over " in failure["reason"]
    ledger = played.run.records("privacy")
    assert [line["clients"] for line in ledger] == [[0, 1, 2, 3], [1], []]
    assert [line["releases"] for line in ledger] == [1, 2, 2]
    rows = {int(p): n for p, n in ledger[-1]["rows"].items()}
    assert rows == {r["partition_id"]: r["num_examples"] for r in played.run.records("client")}
    steps = {p: noised_steps(config.client, n) for p, n in rows.items()}
    assert ledger[-1]["epsilon"] == max(
        sum_epsilon(2.0, count * (2 if p == 1 else 1), 1e-5, rate)
        for p, (rate, count) in steps.items()
    )


def test_without_noise_there_is_no_bound(micro: Fixture, paper: Any) -> None:
    ledger = RowLedger(micro(*ROWS, "privacy.noise_multiplier=0"), paper)
    ledger.ask(1, [0])
    ledger.learn(1, {0: 4})
    assert ledger.epsilon() == math.inf
    assert not ledger.is_spent(), "and without a budget nothing to spend"


def test_the_budget_stops_before_the_round_that_would_exceed_it(micro: Fixture, paper: Any) -> None:
    one, two = (sum_epsilon(2.0, rounds * 2, 1e-5, 0.5) for rounds in (1, 2))
    config = micro(*ROWS, f"privacy.epsilon_budget={(one + two) / 2}", "strategy.max_retries=0")
    ledger = RowLedger(config, paper)
    assert not ledger.is_spent()
    ledger.ask(1, [0])
    ledger.learn(1, {0: 4})
    assert ledger.is_spent()
    check_row_budget(config, [4])
    with pytest.raises(ConfigError, match=r"expected at least .* a client with 1 of them"):
        check_row_budget(
            micro(*ROWS, "privacy.epsilon_budget=0.1", "strategy.max_retries=0"), [1, 4]
        )


def test_a_run_stops_in_time_and_tells_no_losses(micro: Fixture, play: Fixture) -> None:
    played = play(micro(*ROWS, "num_rounds=2"))
    records = played.run.records("client")
    assert records
    for record in records:
        assert "loss" not in record
        assert "tokens" not in record
    rounds = played.run.records("round")
    assert "train_loss" not in rounds[-1]
    ledger = played.run.records("privacy")
    assert [(line["of_round"], bool(line["rows"])) for line in ledger] == [
        (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    assert 0 < ledger[1]["epsilon"] < ledger[3]["epsilon"]
    budget = (ledger[1]["epsilon"] + ledger[3]["epsilon"]) / 2
    short = play(
        micro(*ROWS, "num_rounds=2", f"privacy.epsilon_budget={budget}", "strategy.max_retries=0")
    )
    assert [r["round"] for r in short.run.records("round")] == [0, 1]


def test_without_noise_and_clip_private_training_is_repeatable_in_kind(
    micro: Fixture, play: Fixture
) -> None:
    """Rows are drawn from the system's entropy, so two runs differ even where nothing is noised."""
    settings = (*ROWS, "num_rounds=1", "privacy.noise_multiplier=0", "privacy.clip_norm=1e9")
    one, two = (play(micro(*settings)).strategy.checkpoint(1).arrays["adapter"] for _ in range(2))
    assert (one != two).any()


def test_a_made_up_number_of_rows_does_not_keep_the_server_busy(micro: Fixture, paper: Any) -> None:
    ledger = RowLedger(micro(*ROWS), paper)
    ledger.ask(1, [0])
    ledger.learn(1, {0: 10**9})
    rate, steps = noised_steps(micro(*ROWS).client, 10**9)
    assert ledger.epsilon() == sum_rdp_epsilon(2.0, steps, 1e-5, rate)


def test_a_delta_that_one_row_would_pass_is_named_once(micro: Fixture, paper: Any) -> None:
    ledger = RowLedger(micro(*ROWS, "privacy.delta=0.1"), paper)
    ledger.learn(1, {0: 9})
    assert not [r for r in paper.written if r["kind"] == "event"], "0.1 is below 1 / 9"
    ledger.learn(1, {1: 10})
    ledger.learn(2, {2: 40})
    [event] = [r for r in paper.written if r["kind"] == "event"]
    assert event["text"].startswith("privacy.delta=0.1 and a client with 10 rows: ")
