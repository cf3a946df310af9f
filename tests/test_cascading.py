import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.tiers import Tier

Fixture = Callable[..., Any]
TIERS = (
    "cascade.tiers=[{name:small,members:[{model:tiny}],kind:self_consistency,samples:3,temperature:0.7,"
    "price_in:0.1,price_out:0.1,rho:0},{name:large,members:[{model:tiny}]}]"
)
SMALL = ("experiment=smoke", "task.validation_rows=20", "task.test_rows=24", TIERS)


@pytest.fixture
def act(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Do an action; returns standard output."""

    def done(*overrides: str) -> str:
        capsys.readouterr()
        assert actions.act(compose_run(overrides), overrides) == 0
        return capsys.readouterr().out

    return done


def test_a_chain_leaves_a_recording_whose_replay_prints_the_same(
    act: Fixture, tmp_path: Path
) -> None:
    live = act("action=cascade", *SMALL, "format=json", f"out_dir={tmp_path / 'c'}")
    rows = {(row.get("method"), row.get("theta")): row for row in json.loads(live)}
    replayed = act("action=cascade", f"replay={tmp_path / 'c' / 'answers.jsonl'}", "format=json",
                   "prices=[small:0.1/0.1,large:1/1]")  # fmt: skip
    for row in json.loads(replayed):
        if row["table"] == "curve":
            own = rows[row["method"], row["theta"]]
            for name in ("correct", "cost", "deferral_rate", "accuracy_low", "cost_per_query"):
                assert own[name] == pytest.approx(row[name]), (row["method"], name)
    found = json.loads((tmp_path / "c" / "thresholds.json").read_text())["tiers"]["small"]
    theta = found["theta"]
    answered = rows["cascade", theta]["deferral_rate"] if theta is not None else 1.0
    assert rows["calibrated", None]["deferral_rate"] == answered
    assert found["total"] == 20
    with pytest.raises(ConfigError, match=r"holds answers already; replay=.*answers\.jsonl"):
        act("action=cascade", *SMALL, f"out_dir={tmp_path / 'c'}")


def test_a_chain_that_stops_half_way_can_be_asked_again(
    act: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that fails at the last tier leaves no half recording that a second try would trip over."""
    asked = Tier.ask

    def failing(tier: Tier, *words: Any) -> Any:
        if tier.config.name == "large":
            raise RunStoppedError("endpoint far: expected an answer, got status 503")
        return asked(tier, *words)

    words = (
        "action=cascade",
        *SMALL,
        "cascade.thetas=[1]",
        "format=json",
        f"out_dir={tmp_path / 'c'}",
    )
    with monkeypatch.context() as patched:
        patched.setattr(Tier, "ask", failing)
        with pytest.raises(RunStoppedError, match="status 503"):
            act(*words)
    assert list((tmp_path / "c").iterdir()) == []
    assert json.loads(act(*words))


def test_given_thresholds_need_no_validation_rows(act: Fixture, tmp_path: Path) -> None:
    out = act("action=cascade", *SMALL, "task.validation_rows=-1", "cascade.thetas=[1]", "format=json",
              f"out_dir={tmp_path / 'c'}")  # fmt: skip
    rows = {(row.get("method"), row.get("theta")): row for row in json.loads(out)}
    assert rows["calibrated", None]["cost"] == rows["cascade", 1.0]["cost"]
    assert not (tmp_path / "c" / "validation.jsonl").exists()


def test_clients_queries_cost_and_score_what_the_same_chain_does_in_one_place(
    act: Fixture, tmp_path: Path
) -> None:
    live = act("action=cascade", *SMALL, "task.validation_rows=-1", "cascade.thetas=[1]", "format=json",
               f"out_dir={tmp_path / 'c'}")  # fmt: skip
    here = next(row for row in json.loads(live) if row.get("method") == "calibrated")
    there = json.loads(
        act("action=query", *SMALL, "cascade.thetas=[1]", f"out_dir={tmp_path / 'q'}")
    )
    assert there["queries"] == here["queries"] == 24
    assert there["deferral_rate"] == here["deferral_rate"]
    assert 0 < there["deferral_rate"] < 1
    assert there["client_cost"] == here["tiers"][0]["cost"]
    assert there["server_cost"] == here["tiers"][1]["cost"]
    run = RunDirectory.open(tmp_path / "q")
    assert run.summary() == there
    kinds = {(r["message"], r["direction"]): r["bytes"] for r in run.records("bytes")}
    assert kinds["query.pending", "uplink"] > there["deferred_text_bytes"] > 0
    assert sum(v for (_, way), v in kinds.items() if way == "uplink") == there["uplink_bytes"]
    assert len(list((tmp_path / "q" / "clients" / "answers").iterdir())) == 4


def test_clients_calibrate_what_one_place_does_over_the_same_rows(
    act: Fixture, tmp_path: Path
) -> None:
    risk = "cascade.risk=0.9"
    act("action=cascade", *SMALL, risk, f"out_dir={tmp_path / 'c'}")
    act("action=calibrate", *SMALL, risk, f"out_dir={tmp_path / 'f'}")
    here, there = (json.loads((tmp_path / name / "thresholds.json").read_text()) for name in "cf")
    assert here["tiers"] == there["tiers"]
    assert there["tiers"]["small"]["total"] == 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["action=query", "experiment=smoke"], "two or more cascade.tiers, got none"),
        (["action=run", *SMALL], "cascade=none: expected with action=cascade or calibrate or query or serve"),
        (["action=cascade", *SMALL, "method.rank=2"], "expected only cascade, task, .* got method.rank=2"),
        (["action=serve", *SMALL], "expected cascade.thetas, one for each tier but the last"),
        (["action=serve", *SMALL, "run=x"], "got both, run=x"),
        (["action=query", *SMALL, "runtime=simulation"], "runtime=simulation: expected runtime=loopback"),
        (["action=cascade", *SMALL, "cascade.tiers.0.members=[{run:absent}]"], "absent is not a run directory"),
        (["action=query", *SMALL, "cascade.tiers.0.members=[{base_url:'http://x',model:m}]"], "got the endpoint"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_and_nothing_is_written(
    more: list[str], message: str, act: Fixture, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        act(*more, f"out_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_clients_calibrate_one_tier(act: Fixture, tmp_path: Path) -> None:
    third = TIERS.removesuffix("]") + ",{name:more,members:[{model:tiny}]}]"
    with pytest.raises(ConfigError, match=r"expected cascade.thetas with more than two tiers"):
        act("action=query", *SMALL[:-1], third, f"out_dir={tmp_path / 'out'}")
