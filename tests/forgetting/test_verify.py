"""A removal that is attacked: the odd client of ``benchmarks.odd_client`` leaves a run of the tiny model."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.odd_client import ODD
from fedllm_flwr import actions
from fedllm_flwr.actions import run_experiment
from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError, RunStoppedError, VerificationError
from fedllm_flwr.forgetting.examiner import Material
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.forgetting.verify import VERIFICATION, plan_of, spent
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.verification import VerificationConfig
from fedllm_flwr.unlearning.battery import DISTANCE, LIRA, LOSS
from fedllm_flwr.unlearning.budget import least_queries
from fedllm_flwr.unlearning.verdict import CONTROLS

Fixture = Callable[..., Any]
TRAINED = ("retrain-1", "retrain-2", "retrain-3", "retrain-4", "retrain-5")


@pytest.fixture(scope="module")
def attacked(odd: Fixture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command, killed in the middle of the second retrained model, then typed again: merge, then its fallback."""
    source, rows = odd()
    folder = tmp_path_factory.mktemp("attacked") / "new"
    command = ["action=unlearn", f"run={source.path}", f"client={ODD}", "method=merge", f"out_dir={folder}",
               f"runtime.data_path={rows}", "verify=adversarial", "verification=quick", "fallback=retrain"]  # fmt: skip
    before = {p: p.read_bytes() for p in source.path.rglob("*") if p.is_file()}
    carried: list[str] = []

    def killed(config: RunConfig, overrides: Sequence[str], out_dir: str) -> Any:
        if "retrain-2" in out_dir:
            raise RunStoppedError("killed")
        carried.append(Path(out_dir).name)
        return run_experiment(config, overrides, out_dir)

    def counted(config: RunConfig, overrides: Sequence[str], out_dir: str) -> Any:
        carried.append(Path(out_dir).name)
        return run_experiment(config, overrides, out_dir)

    patch = pytest.MonkeyPatch()
    patch.setattr(actions, "run_experiment", killed)
    with pytest.raises(RunStoppedError):
        actions.act(compose_run(command), command)
    patch.setattr(actions, "run_experiment", counted)
    code = actions.act(compose_run(command), command)
    patch.undo()
    assert {p: p.read_bytes() for p in before} == before, "the run itself is not touched"
    second = folder.with_name("new_retrain")
    return {
        "code": code,
        "carried": carried,
        "merge": RunDirectory.open(folder),
        "retrain": RunDirectory.open(second),
        "rows": rows,
    }


def certificate(run: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "certificate.json").read_text())
    return found


@pytest.mark.slow
def test_merge_misses_the_retrained_models_and_the_record_says_where(
    attacked: dict[str, Any],
) -> None:
    run = attacked["merge"]
    found = certificate(run)
    verdict = found["verdict"]
    assert verdict["decision"] in ("fail", "inconclusive")
    assert run.summary()["verdict"] == verdict["decision"]
    assert verdict["deciding_check"] in {check["name"] for check in verdict["checks"]}
    assert verdict["full_auc"] >= 0.7
    assert {LOSS, DISTANCE} & {check["name"] for check in verdict["checks"]}
    assert found["left_out"][LIRA].startswith("no shadow models were asked for")
    assert all(len(check["null"]) == 5 for check in verdict["checks"])


@pytest.mark.slow
def test_all_four_controls_fail(attacked: dict[str, Any]) -> None:
    for run in (attacked["merge"], attacked["retrain"]):
        verdict = certificate(run)["verdict"]
        assert verdict["controls"] == dict.fromkeys(CONTROLS, "failed")


@pytest.mark.slow
def test_after_it_the_others_are_trained_anew_and_that_passes(attacked: dict[str, Any]) -> None:
    found = certificate(attacked["retrain"])
    assert attacked["code"] == 0
    assert (found["method"], found["fallen_back_from"]) == ("retrain", "merge")
    assert (
        certificate(attacked["merge"])["verdict"]["deciding_check"] in found["fallen_back_because"]
    )
    assert found["verdict"]["decision"] == "pass"
    assert found["verdict"]["by_attacks"] in ("pass", "inconclusive")
    assert found["verdict"]["checks"][0]["measured"] == 0, "no array differs"
    summary = attacked["retrain"].summary()
    assert (summary["verdict"], summary["exactness"]) == ("pass", "exact")
    assert summary["retrain_cpu_ratio"] > 0
    assert found["queries_spent"] == sum(found["queries"].values()) <= found["budget"] == 400
    for line in found["attacks"]:
        area = line["result"]["auc"]
        assert area["low"] <= area["value"] <= area["high"]
    text = (attacked["retrain"].path / "certificate.md").read_text()
    assert "Fallen back from: `merge`, which did not pass" in text
    assert "Control `refusal_wrapper`: failed" in text


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_makes_no_model_twice(attacked: dict[str, Any]) -> None:
    carried = attacked["carried"]
    for name in (*TRAINED, *(f"control-{name}" for name in CONTROLS), "retrain-0"):
        assert carried.count(name) == 1, name
    for run in (attacked["merge"], attacked["retrain"]):
        kept = {p.name for p in (run.path / VERIFICATION).iterdir()}
        assert "runs" not in kept, "models that hold the client are gone"
        assert {f"{name}.safetensors" for name in TRAINED} <= kept


@pytest.mark.slow
def test_a_verification_of_its_own_adds_the_verdict_and_exits_with_4(
    attacked: dict[str, Any], tmp_path: Path, odd: Fixture
) -> None:
    merged = attacked["merge"].path
    before = certificate(attacked["merge"])
    command = ["action=verify", f"run={merged}", "verification=quick"]
    command.append(f"runtime.data_path={attacked['rows']}")
    with pytest.raises(VerificationError, match=r"verification says (fail|inconclusive)") as stop:
        actions.act(compose_run(command), command)
    assert stop.value.exit_code == 4
    after = certificate(attacked["merge"])
    assert after == before, "nothing was asked or trained again"
    lost = shutil.copytree(merged, tmp_path / "far" / "away")
    command[1] = f"run={lost}"
    with pytest.raises(ConfigError, match=r"expected the run .* found none"):
        actions.act(compose_run(command), command)


def test_what_cannot_be_verified_is_refused_and_nothing_is_written(
    odd: Fixture, made: Fixture, tmp_path: Path
) -> None:
    source, rows = odd()
    for more, match in (
        (["budget=100"], "query budget: expected at least 118 queries for a power of 0.9"),
        (["client=9"], "expected one of the run's 3 clients, got client 9"),
        ([f"run={made('ledger').path}", "client=0"], "expected at least 8 .* rows of client 0"),
    ):
        command = ["action=unlearn", "method=retrain", f"out_dir={tmp_path / 'new'}", "verify=adversarial",
                   f"runtime.data_path={rows}" if len(more) < 2 else "runtime.threads=1", *more]  # fmt: skip
        given = {o.partition("=")[0] for o in more}
        command += [o for o in (f"run={source.path}", f"client={ODD}") if o.partition("=")[0] not in given]  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            actions.act(compose_run(command), command)
        assert list(tmp_path.iterdir()) == []
    command = ["action=verify", f"run={source.path}"]
    with pytest.raises(ConfigError, match="expected a finished run that action=unlearn has made"):
        actions.act(compose_run(command), command)


@pytest.mark.parametrize("budget", [118, 200, 400, 1000, 5000])
@pytest.mark.parametrize("rows", [10, 64, 400])
@pytest.mark.parametrize(("forms", "canaries"), [((), 0), (("pair", "choice"), 3)])
def test_a_plan_keeps_to_the_budget_and_gives_the_stated_power_first(
    odd: Fixture, budget: int, rows: int, forms: tuple[str, ...], canaries: int
) -> None:
    source, _ = odd()
    request = read_request(source, str(ODD), "retrain")
    material = Material(rows, 2 * rows, ("about", "read", "other case"), forms, canaries, {})
    plan = plan_of(request, VerificationConfig(budget=budget), material)
    assert spent(plan, material, budget).left >= 0
    needed = least_queries() // 2
    assert plan.members == min(rows, max(needed, int(0.6 * budget) // 2))
    assert plan.others >= min(plan.members, 2 * rows)
    assert max(plan.reworded, plan.paired) <= min(plan.members, plan.others)
