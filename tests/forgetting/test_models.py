from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, VerificationError
from fedllm_flwr.forgetting.models import exactly_merged, merged, scrubbed, trained_again
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.unlearning.removal import exactness_of
from strategies.observer import MERGING, UNMEASURED

Fixture = Callable[..., Any]


def final(run: Any) -> checkpoints.Checkpoint:
    found = checkpoints.latest(run.checkpoints)
    assert found is not None
    return found


def test_a_state_without_a_client_lacks_what_it_says_of_it() -> None:
    balance = {"multipliers": {"a": 0.5}, "counts": {"0": {"a": 3}, "1": {"a": 7}}}
    state = {"trained": [0, 1, 2], "clusters": {"1": "x", "2": "y"}, "run": "r", "balance": balance}
    assert scrubbed(state, 1) == {
        "trained": [0, 2],
        "clusters": {"2": "y"},
        "run": "r",
        "balance": {"multipliers": {"a": 0.5}, "counts": {"0": {"a": 3}}},
    }
    assert scrubbed({"run": "r"}, 1) == {"run": "r"}
    assert state["trained"] == [0, 1, 2]
    assert sorted(balance["counts"]) == ["0", "1"]


def test_subtraction_after_one_round_is_the_run_without_the_client_to_rounding(
    made: Fixture,
) -> None:
    one = ("num_rounds=1", "runtime.cohort_tokens=0")
    request = read_request(made("ledger", *one), "4", "merge")
    assert request.exactness == "rounding"
    found = merged(request)
    expected = final(made("ledger", *one, "unlearning.removed=[4]"))
    np.testing.assert_allclose(found.arrays["adapter"], expected.arrays["adapter"], atol=1e-7)
    assert found.state[UNMEASURED] is True


@pytest.mark.slow
def test_subtraction_after_several_rounds_is_farther_from_it_than_that(made: Fixture) -> None:
    exact = ("runtime.cohort_tokens=0",)
    request = read_request(made("ledger", *exact), "4", "merge")
    assert (request.exactness, exactness_of("merge", num_rounds=1)) == ("approximate", "rounding")
    expected = final(made("ledger", *exact, "unlearning.removed=[4]")).arrays["adapter"]
    distance = np.abs(merged(request).arrays["adapter"] - expected).max()
    assert distance > 1e-4


def test_training_a_client_again_gives_the_update_that_it_sent(made: Fixture) -> None:
    request = read_request(made("sift_ledger"), "2", "exact_merge")
    assert request.ledger is not None
    tau, tokens = trained_again(request)
    kept = next(c.update for c in request.ledger.read(1).contributions if c.client == 2)
    assert tau.tobytes() == kept.tobytes()
    [record] = [r for r in request.source.records("client") if r["partition_id"] == 2]
    assert tokens == record["tokens"]


def test_the_kept_update_and_the_one_trained_again_give_the_same_model(made: Fixture) -> None:
    kept, kept_tokens = exactly_merged(read_request(made("sift_ledger"), "2", ""))
    trained, tokens = exactly_merged(read_request(made("sift"), "2", ""))
    assert kept_tokens == 0 < tokens
    for name, values in trained.arrays.items():
        assert kept.arrays[name].tobytes() == values.tobytes(), name
    assert sorted(kept.arrays) == sorted(trained.arrays)
    assert f"{MERGING}mask/2" not in kept.arrays


def test_another_update_than_was_merged_is_refused(copied: Fixture, contents: Fixture) -> None:
    """A ledger whose file and index were changed together."""
    from fedllm_flwr.runs.atomic import write_bytes
    from fedllm_flwr.unlearning.ledger import Contribution, Ledger

    run = copied("sift_ledger")
    ledger = Ledger(run.path / "ledger", write_bytes)
    old = ledger.read(1).contributions
    ledger.cut(0)
    for each in old:
        ledger.record(1, Contribution(each.client, each.weight, each.update * 2, each.seed))
    ledger.close(1)
    before = contents(run.path)
    with pytest.raises(VerificationError, match="client 2: expected the update that was added"):
        exactly_merged(read_request(run, "2", ""))
    assert contents(run.path) == before


def test_rows_on_other_machines_are_not_trained_on_here(made: Fixture) -> None:
    runtime = RuntimeConfig(name="deployment")
    request = read_request(made("sift"), "2", "", runtime)
    with pytest.raises(ConfigError, match="runtime=deployment: the client's rows are on its node"):
        exactly_merged(request)
