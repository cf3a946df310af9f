import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.tiers import Tier

Fixture = Callable[..., Any]
TIERS = (
    "cascade.tiers=[{name:small,members:[{model:tiny}],kind:self_consistency,samples:3,temperature:0.7,"
    "price_in:0.1,price_out:0.1,rho:0},{name:large,members:[{model:tiny}]}]"
)
SMALL = ("experiment=smoke", "task.validation_rows=20", "task.test_rows=24", TIERS)


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


ENSEMBLE = (
    "experiment=smoke", "action=cascade", "task.validation_rows=20", "task.test_rows=24", "format=json",
    "cascade.tiers=[{name:small,members:[{model:tiny,name:a},{model:tiny,name:b}],price_in:0.1,price_out:0.1,rho:0},"
    "{name:large,members:[{model:tiny}],kind:self_consistency,samples:2,temperature:1}]",
)  # fmt: skip


def test_a_live_chain_stands_beside_its_baselines_with_times(act: Fixture, tmp_path: Path) -> None:
    """Clones before samples of themselves: they always agree, and their agreement says nothing."""
    more = ("cascade.samples_temperature=1", "cascade.timed_queries=3")
    rows = json.loads(act(*ENSEMBLE, *more, f"out_dir={tmp_path}"))
    curve = [row for row in rows if row["table"] == "curve"]
    lines = {(row["method"], row["theta"]): row for row in curve}
    first, last = lines["always_first", None], lines["always_last", None]
    for (method, _), row in lines.items():
        if method in ("cascade", "random", "score_cascade", "calibrated"):
            assert row["cost"] >= first["cost"] * (1 - 1e-12), "every query pays the first tier"
            assert row["tiers"][0]["reached"] == 24
        if method in ("cascade", "calibrated", "always_first", "always_last"):
            assert (
                0
                < row["p50_serial_seconds"]
                <= row["p95_serial_seconds"]
                <= row["p99_serial_seconds"]
            )
            assert row["p50_parallel_seconds"] <= row["p50_serial_seconds"]
    gamma = first["cost"] / 2 / last["cost"]
    for theta in (0.5, 1.0):
        row = lines["cascade", theta]
        assert row["deferral_rate"] == 0
        assert row["cost_per_query_ratio"] == pytest.approx(2 * gamma), "kγ + p with p = 0"
        assert row["parallel_cost_per_query_ratio"] * 2 == pytest.approx(
            row["cost_per_query_ratio"] * last["cost_per_query"] / last["parallel_cost_per_query"]
        )
    assert lines["self_consistency", None]["cost"] < first["cost"], "one prompt is read once"
    assert 0 < lines["self_consistency_cascade", 1.0]["deferral_rate"] < 1
    assert ("router", 1.0) in lines
    signal = next(row for row in rows if row["table"] == "signals" and row["tier"] == "small")
    assert signal["auroc"] == pytest.approx(0.5, abs=0.05)
    assert {p.name for p in tmp_path.iterdir()} == {
        "answers.jsonl", "validation.jsonl", "thresholds.json", "samples.jsonl", "timed.jsonl", "curve.md", "curve.csv",
        "curve.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "curve.json").read_text()) == rows


def test_samples_beside_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="the first tier is samples of one member already"):
        compose_run([*SMALL, "action=cascade", "cascade.samples_temperature=1"])


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["action=query", "experiment=smoke"], "two or more cascade.tiers, got none"),
        (["action=run", *SMALL], "cascade=none: expected with action=cascade or calibrate or query or serve"),
        (["action=cascade", *SMALL, "method.rank=2"], "expected only cascade, task, .* got method.rank=2"),
        (["action=serve", *SMALL], "expected cascade.thetas, one for each tier but the last"),
        (["action=serve", *SMALL, "run=x"], "got both, run=x"),
        (["action=query", *SMALL, "runtime=deployment", "task=csv", "task.max_tokens=48"],
         "task=csv: the server answers what is deferred and cannot read the nodes' files"),
        (["action=query", *SMALL, "runtime=deployment", "strategy.min_fraction=1"],
         "runtime.connection: expected the name of your SuperLink's connection"),
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
