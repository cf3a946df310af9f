import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.forgetting.request import default_method, read_request
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]

WRONG = [
    ("ledger", "client=9", "", "expected one of the run's 6 clients, got client 9"),
    ("ledger", "client=1", "", "expected a client that took part, got client 1, whose update was never used"),
    ("ledger", "client=x", "", "client: expected the number of a client, got 'x'"),
    ("ledger", "client=-1", "", "client: expected the number of a client, got '-1'"),
    ("ledger", "", "", "client: expected the number of a client, got ''"),
    ("ledger", "client=0", "method=noise", "unlearning method: expected exact_merge, shards, .* got 'noise'"),
    ("ledger", "client=0", "method=exact_merge", "method=exact_merge and strategy=factor_mean"),
    ("ledger", "client=0", "method=shards", "method=shards and unlearning=ledger"),
    ("ledger", "client=0", "seed=2", "action=unlearn: the run has its own settings, .* got seed=2"),
    ("adam", "client=0", "method=merge", "method=merge and strategy.server_optimizer=fedadam"),
    ("adam", "client=0", "method=replay", "method=replay and strategy.server_optimizer=fedadam"),
    ("plain", "client=0", "method=rewind", "expected a run with unlearning=ledger, got .* with unlearning=none"),
    ("plain", "client=0", "method=merge", "expected a run with unlearning=ledger"),
    ("sift", "client=0", "method=merge", "expected a run with unlearning=ledger"),
    ("sift_ledger", "client=0", "method=merge", "method=merge and strategy=sift_merge"),
    ("sift", "client=7", "", "expected one of the run's 6 clients, got client 7"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "client", "more", "message"), WRONG)
def test_a_wrong_request_says_what_is_wrong_and_writes_nothing(
    case: str, client: str, more: str, message: str, made: Fixture, contents: Fixture
) -> None:
    run = made(case)
    before = contents(run.path.parent)
    command = [word for word in ("action=unlearn", f"run={run.path}", client, more) if word]
    with pytest.raises(ConfigError, match=message):
        actions.act(compose_run(command), command)
    assert contents(run.path.parent) == before


def test_client_0_is_a_client(made: Fixture) -> None:
    command = ["action=unlearn", f"run={made('ledger').path}", "client=0"]
    assert compose_run(command).forget == "0"
    assert compose_run(["experiment=smoke", "client=default", "method=fedlora"]).forget == ""


def test_a_client_that_was_removed_is_not_removed_again(made: Fixture) -> None:
    run = made("ledger", "unlearning.removed=[0]")
    with pytest.raises(ConfigError, match="got client 0, removed already"):
        read_request(run, "0", "")


def test_a_run_that_is_not_finished_is_refused(copied: Fixture, contents: Fixture) -> None:
    run = copied("ledger")
    (run.path / "summary.json").unlink()
    before = contents(run.path)
    with pytest.raises(ConfigError, match=r"expected a finished run, .* action=resume run="):
        read_request(run, "0", "")
    assert contents(run.path) == before


def test_a_damaged_ledger_is_named(copied: Fixture) -> None:
    run = copied("ledger")
    (run.path / "ledger" / "round-0002.json").write_text("{")
    with pytest.raises(DataError, match=r"round-0002\.json"):
        read_request(run, "0", "")


def test_a_removed_ledger_is_no_ledger(copied: Fixture) -> None:
    run = copied("ledger")
    shutil.rmtree(run.path / "ledger")
    with pytest.raises(ConfigError, match="expected a run with unlearning=ledger"):
        read_request(run, "0", "")


def test_a_run_whose_model_was_made_approximately_is_not_rewound(
    copied: Fixture,
) -> None:
    import json

    run = copied("ledger")
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["config"]["unlearning"] |= {"removed": [4], "removal": "replay", "exactness": "approximate"}  # fmt: skip
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    again = RunDirectory.open(run.path)
    with pytest.raises(ConfigError, match="was itself made by replay, approximate"):
        read_request(again, "0", "rewind")
    assert read_request(again, "0", "retrain").exactness == "exact"


def test_the_request_knows_when_each_client_took_part(made: Fixture) -> None:
    request = read_request(made("ledger"), "0", "rewind")
    assert request.participation == {0: (2, 3), 2: (1, 3), 3: (3,), 4: (1, 2), 5: (1, 2)}
    assert request.first_round == 2
    assert read_request(made("plain"), "0", "").method == "retrain"
    assert read_request(made("sift"), "0", "").participation == dict.fromkeys(range(6), (1,))


def test_the_default_method_is_the_cheapest_exact_one(made: Fixture) -> None:
    found = {case: default_method(read_request(made(case), "0", "").config) for case in
             ("ledger", "plain", "sift", "shards")}  # fmt: skip
    assert found == {
        "ledger": "rewind",
        "plain": "retrain",
        "sift": "exact_merge",
        "shards": "shards",
    }


def test_the_new_settings_pass_over_the_client_and_say_how_it_was_removed(made: Fixture) -> None:
    request = read_request(made("ledger"), "0", "replay")
    new = request.new_config()
    assert (new.unlearning.removed, new.unlearning.removal) == ((0,), "replay")
    assert new.unlearning.exactness == "approximate"
    assert new.client.local_steps == 1, "half of two"
    epochs = dataclasses.replace(request.config.client, local_steps=0, local_epochs=4)
    by_epochs = dataclasses.replace(
        request, config=dataclasses.replace(request.config, client=epochs)
    )
    assert by_epochs.new_config().client.local_epochs == 2
    assert new.fingerprint() != request.config.fingerprint()


def test_a_folder_that_holds_another_run_is_refused(
    made: Fixture, copied: Fixture, contents: Fixture, tmp_path: Path
) -> None:
    other = copied("plain")
    before = contents(other.path)
    command = ["action=unlearn", f"run={made('ledger').path}", "client=0", f"out_dir={other.path}"]
    with pytest.raises(ConfigError, match="holds another run; name another out_dir"):
        actions.act(compose_run(command), command)
    assert contents(other.path) == before
