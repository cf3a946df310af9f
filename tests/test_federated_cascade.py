import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord

from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.federated_cascade import federate, tiers_override
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.status import run_status

Fixture = Callable[..., Any]
TIERS = (
    "cascade.tiers=[{name:small,members:[{model:tiny}],kind:self_consistency,samples:3,temperature:0.7,"
    "price_in:0.1,price_out:0.1,rho:0},{name:large,members:[{model:tiny}]}]"
)
SMALL = ("experiment=smoke", "task.validation_rows=20", "task.test_rows=24", TIERS)


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


def test_clients_calibrate_one_tier(act: Fixture, tmp_path: Path) -> None:
    third = TIERS.removesuffix("]") + ",{name:more,members:[{model:tiny}]}]"
    with pytest.raises(ConfigError, match=r"expected cascade.thetas with more than two tiers"):
        act("action=query", *SMALL[:-1], third, f"out_dir={tmp_path / 'out'}")


def test_a_folder_that_holds_a_run_is_refused_before_anything_starts(
    act: Fixture, tmp_path: Path
) -> None:
    """Else the summary that lies there would be taken for the new one's."""
    act("action=calibrate", *SMALL, f"out_dir={tmp_path / 'out'}")
    for runtime in ("loopback", "simulation"):
        with pytest.raises(ConfigError, match="holds a run already"):
            act("action=query", *SMALL, f"runtime={runtime}", f"out_dir={tmp_path / 'out'}")


def test_what_it_leaves_is_no_training_run(act: Fixture, tmp_path: Path) -> None:
    """To go on with it would train an adapter into the folder."""
    out = tmp_path / "out"
    act("action=calibrate", *SMALL, f"out_dir={out}")
    for action in ("resume", "evaluate", "serve", "unlearn"):
        more = ["client=1"] if action == "unlearn" else []
        with pytest.raises(ConfigError, match="got what action=calibrate left"):
            act(f"action={action}", f"run={out}", *more)


def test_too_few_answers_stop_it_with_a_reason_in_the_run_directory(
    edge_grid: Fixture, tmp_path: Path
) -> None:
    words = ["action=query", *SMALL, "cascade.thetas=[1]", f"out_dir={tmp_path / 'out'}"]
    composed = compose_run(words)

    def silent(asked: Any, replies: Any) -> Any:
        return [] if asked[0].metadata.message_type == "query.pending" else replies

    with pytest.raises(RunStoppedError, match="queries: 0 of 4 clients gave a good answer"):
        federate(edge_grid(2, silent), composed.config, composed.cascade, "query")
    run = RunDirectory.open(tmp_path / "out")
    assert not run.is_finished
    assert run_status(run)["reason"].startswith("queries: 0 of 4 clients")
    assert {r["message"] for r in run.records("bytes")} == {"query", "query.pending"}


def test_an_answer_that_is_too_large_counts_for_nothing(edge_grid: Fixture, tmp_path: Path) -> None:
    words = [
        "action=calibrate",
        *SMALL,
        "runtime.max_message_mb=0.01",
        f"out_dir={tmp_path / 'out'}",
    ]
    composed = compose_run(words)

    def huge(asked: Any, replies: Any) -> Any:
        for reply in replies:
            if asked[0].metadata.message_type == "query.calibrate":
                reply.content["more"] = ConfigRecord({"x": "y" * 20_000})
        return replies

    with pytest.raises(RunStoppedError, match="0 of 4 clients gave a good answer"):
        federate(edge_grid(2, huge), composed.config, composed.cascade, "calibrate")


@pytest.mark.parametrize("name", ["plain", "it's", 'a "b"', "a, b: [c] {d}", "ünï"])
def test_tiers_mean_the_same_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ServerApp composes them again, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    quoted = name.replace("'", "\\'")
    members = f"[{{run:'{quoted}'}},{{model:path,path:'{quoted}/m'}}]"
    tiers = (
        f"cascade.tiers=[{{name:'{quoted}',members:{members},price_in:1e-6}},"
        "{name:far,members:[{base_url:'http://x:1/v1',model:m}]}]"
    )
    given = compose_run(["experiment=smoke", "action=query", tiers]).cascade
    again = compose_run(["experiment=smoke", "action=query", tiers, tiers_override(given)]).cascade
    first, far = again.tiers
    assert first.name == name
    assert [m.run or m.path for m in first.members] == [
        str(tmp_path / name),
        str(tmp_path / name / "m"),
    ]
    assert first.price_in == 1e-6
    assert far == given.tiers[1]
