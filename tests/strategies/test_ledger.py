import shutil
from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.privacy import (
    fixed_size_epsilon,
    single_release_epsilon,
    sum_epsilon,
    sum_rdp_epsilon,
)
from fedllm_flwr.settings.accounts import epsilon_of
from strategies.ledger import Ledger, check_budget

Fixture = Callable[..., Any]
CENTRAL = (
    "strategy.weighting=uniform",
    "method.sharing=b_only",
    "privacy=central",
    "privacy.noise_multiplier=4",
)


def test_each_mechanism_has_its_account(micro: Fixture) -> None:
    coins = micro(*CENTRAL).privacy
    assert epsilon_of(coins, 3, 4, 0.5) == sum_epsilon(4.0, 3, 1e-5, 0.5)
    fixed = micro(*CENTRAL, "privacy.cohort=fixed").privacy
    assert epsilon_of(fixed, 3, 4, 0.5) == fixed_size_epsilon(4.0, 3, 1e-5, 2, 4)
    local = micro("privacy=local", "privacy.noise_multiplier=4").privacy
    assert epsilon_of(local, 3, 4, 0.5) == single_release_epsilon(4.0, 3, 1e-5)
    assert epsilon_of(coins, 0, 4, 0.5) == 0


def test_a_release_is_written_down_with_what_it_rests_on(micro: Fixture, paper: Any) -> None:
    ledger = Ledger(micro(*CENTRAL, "strategy.cohort_fraction=0.5"), paper)
    ledger.spend(1, (), 1.0)
    ledger.spend(2, (), 0.8)
    assert paper.written[1] == {
        "kind": "privacy", "of_round": 2, "mechanism": "central", "releases": 2, "noise_multiplier": 4.0,
        "clip_norm": 0.8, "delta": 1e-5, "epsilon": sum_epsilon(4.0, 2, 1e-5, 0.5), "clients": [],
        "sampling_rate": 0.5, "neighbours": "added or removed", "rdp_epsilon": sum_rdp_epsilon(4.0, 2, 1e-5, 0.5),
    }  # fmt: skip
    assert paper.written[0]["epsilon"] < paper.written[1]["epsilon"]
    assert "round" not in paper.written[0], "or a resume would forget it"


@pytest.mark.parametrize(("fraction", "neighbours"), [(0.5, "replaced"), (1.0, "added or removed")])
def test_a_fixed_cohort_says_what_its_neighbours_are(
    fraction: float, neighbours: str, micro: Fixture, paper: Any
) -> None:
    config = micro(*CENTRAL, "privacy.cohort=fixed", f"strategy.cohort_fraction={fraction}")
    Ledger(config, paper).spend(1, (), 1.0)
    assert (paper.written[0]["sampling_rate"], paper.written[0]["neighbours"]) == (
        fraction,
        neighbours,
    )


def test_a_client_spends_when_it_is_asked_and_the_one_asked_most_counts(
    micro: Fixture, paper: Any
) -> None:
    config = micro("privacy=local", "privacy.noise_multiplier=9")
    ledger = Ledger(config, paper)
    for server_round, asked in enumerate(([0, 1], [2, 3], [1, 2], [1]), start=1):
        ledger.spend(server_round, asked, 1.0)
    assert [r["releases"] for r in paper.written] == [1, 1, 2, 3]
    assert paper.written[-1]["epsilon"] == single_release_epsilon(9.0, 3, 1e-5)
    assert Ledger(config, paper).releases == 3, "another process goes on with the same account"


def test_the_budget_is_a_bound_on_every_release(micro: Fixture, paper: Any) -> None:
    three = sum_epsilon(4.0, 3, 1e-5)
    config = micro(*CENTRAL, f"privacy.epsilon_budget={three}")
    ledger = Ledger(config, paper)
    for server_round in (1, 2, 3):
        assert not ledger.is_spent()
        ledger.spend(server_round, (), 1.0)
    assert ledger.is_spent()
    with pytest.raises(
        RunStoppedError, match=r"round 4: privacy\.epsilon_budget=.* does not allow"
    ):
        ledger.spend(4, (), 1.0)
    assert len(paper.written) == 3
    assert Ledger(config, paper).is_spent()


def test_a_budget_below_one_round_is_refused_before_anything_starts(micro: Fixture) -> None:
    one = sum_epsilon(4.0, 1, 1e-5)
    check_budget(micro(*CENTRAL, f"privacy.epsilon_budget={one}"))
    check_budget(micro())
    with pytest.raises(
        ConfigError, match=r"privacy\.epsilon_budget: expected at least 0\.926\d, what one"
    ):
        check_budget(micro(*CENTRAL, "privacy.epsilon_budget=0.1"))


def test_a_run_ends_one_round_before_it_would_exceed_its_budget(
    micro: Fixture, play: Fixture
) -> None:
    budget = (sum_epsilon(4.0, 2, 1e-5) + sum_epsilon(4.0, 3, 1e-5)) / 2
    config = micro(*CENTRAL, "num_rounds=5", "evaluate_every=5", f"privacy.epsilon_budget={budget}",
                   "privacy.clip_norm=0.1")  # fmt: skip
    played = play(config, splits=("test",))
    assert [r["round"] for r in played.run.records("round")] == [0, 1, 2]
    assert "accuracy" in played.run.records("round")[-1], (
        "the last round is evaluated, whatever its number"
    )
    spent = [r["epsilon"] for r in played.run.records("privacy")]
    assert spent == [sum_epsilon(4.0, n, 1e-5) for n in (1, 2)]
    again = play(config, folder=played.run.path, splits=("test",))
    assert again.sha == played.sha
    assert len(again.run.records("privacy")) == 2


def test_a_round_that_is_run_again_after_a_kill_has_cost_twice(
    micro: Fixture, play: Fixture
) -> None:
    config = micro(*CENTRAL, "num_rounds=2", "privacy.clip_norm=0.1")
    played = play(config)
    shutil.rmtree(played.run.checkpoints / "round-0002")
    again = play(config, folder=played.run.path)
    releases = [(r["of_round"], r["releases"]) for r in again.run.records("privacy")]
    assert releases == [(1, 1), (2, 2), (2, 3)]
    assert again.run.records("privacy")[-1]["epsilon"] == sum_epsilon(4.0, 3, 1e-5)
