import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.compose import Composed, compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]
SMALL = ["experiment=smoke", "task.train_rows=24", "task.validation_rows=8", "task.test_rows=24", "partition=iid",
         "client.local_epochs=0", "client.local_steps=1", "num_rounds=2", "baselines=none"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as the command line leaves it."""
    out_dir = tmp_path_factory.mktemp("actions") / "run"
    overrides = [*SMALL, f"out_dir={out_dir}"]
    assert actions.act(compose_run(overrides), overrides) == 0
    return out_dir


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run, stopped after its first round."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-0002")
    return tmp_path / "run"


def sha(path: Path) -> str:
    return RunDirectory.open(path).summary()["adapter_sha256"]


def test_an_unknown_action_lists_the_known_ones() -> None:
    asked = Composed(compose_run(SMALL).config, "dance", "")
    with pytest.raises(
        ConfigError, match=r"action: expected one of run, resume, evaluate, report.*, got 'dance'"
    ):
        actions.act(asked, [])


@pytest.mark.parametrize(
    "action",
    [
        name
        for name in actions.ACTIONS
        if name not in ("run", "costs", "cascade", "calibrate", "query")
    ],
)
def test_an_action_on_a_run_needs_a_run(action: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"action={action}: needs run=<run directory>, got none"):
        actions.act(compose_run([f"action={action}"]), [])
    with pytest.raises(ConfigError, match="is not a run directory"):
        actions.act(compose_run([f"action={action}", f"run={tmp_path}"]), [])
    assert list(tmp_path.iterdir()) == []


def test_resume_goes_on_under_the_runs_own_settings(
    act: Fixture, finished: Path, unfinished: Path
) -> None:
    out = act("action=resume", f"run={unfinished}")
    assert "Federated (fedlora)" in out
    assert sha(unfinished) == sha(finished)
    assert RunDirectory.open(unfinished).summary()["resumed_rounds"] == 1


def test_resume_may_change_where_it_runs_and_nothing_else(
    act: Fixture, finished: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = []

    def watched(config: Any, overrides: Any, superlink: Any) -> Any:
        carried.append((config, list(overrides)))
        return launch(config, overrides, superlink)

    launch = actions.launch
    monkeypatch.setattr(actions, "launch", watched)
    for setting in ("seed=9", "num_rounds=7"):
        with pytest.raises(
            ConfigError, match=f"action=resume: .* only runtime settings .* got {setting}"
        ):
            act("action=resume", f"run={unfinished}", "runtime.num_nodes=1", setting)
    act("action=resume", f"run={unfinished}", "runtime.num_nodes=1")
    ((config, overrides),) = carried
    started = compose_run(SMALL).config
    assert config == replace(
        started, runtime=replace(started.runtime, num_nodes=1), out_dir=str(unfinished)
    )
    assert overrides == ["action=resume", f"run={unfinished}", "runtime.num_nodes=1"]
    assert sha(unfinished) == sha(finished)


def test_resume_of_a_finished_run_computes_nothing(
    act: Fixture, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "launch", lambda *_: pytest.fail("nothing is left to do"))
    before = RunDirectory.open(finished).records()
    assert "Federated (fedlora)" in act("action=resume", f"run={finished}")
    assert RunDirectory.open(finished).records() == before


def test_evaluate_prints_one_json_object_with_the_runs_accuracy(
    act: Fixture, finished: Path
) -> None:
    found = json.loads(act("action=evaluate", f"run={finished}"))
    summary = RunDirectory.open(finished).summary()
    assert found["test_rows"] == 24
    assert found["accuracy"] == pytest.approx(summary["accuracy"], abs=1 / 24)
    assert found["loss"] == pytest.approx(summary["loss"], rel=1e-4)
    again = json.loads(act("action=evaluate", f"run={finished}", "runtime.threads=2"))
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_evaluate_needs_a_finished_run(finished: Path, unfinished: Path) -> None:
    shutil.rmtree(unfinished / "adapter")
    asked = ["action=evaluate", f"run={unfinished}"]
    with pytest.raises(ConfigError, match="resume it first"):
        actions.act(compose_run(asked), asked)


def test_report_writes_the_page_anew_and_prints_where(act: Fixture, unfinished: Path) -> None:
    (unfinished / "report.html").unlink()
    out = act("action=report", f"run={unfinished}")
    assert out.splitlines()[-1] == str(unfinished / "report.html")
    assert (unfinished / "report.html").stat().st_size > 1000


def test_costs_are_printed_for_the_chosen_model_too_in_every_format(act: Fixture) -> None:
    out = act("action=costs", *SMALL)
    rows = json.loads(out[out.index("\n[\n") :])
    assert [row["model"] for row in rows if row["table"] == "full"][-2:] == ["13B", "tiny"]
    [tiny] = [row for row in rows if row["model"] == "tiny" and row["table"] == "published"]
    assert (tiny["width"], tiny["layers"], tiny["resprompt_bytes"]) == (64, 2, 2 * 10 * 64 * 4)
    assert "| tiny | 64 | 2 | 5,120 |" in out
    assert "\ntiny,64,2,5120," in out


@pytest.mark.parametrize("form", ["markdown", "csv", "json"])
def test_costs_are_printed_in_the_chosen_format_and_in_no_other(form: str, act: Fixture) -> None:
    out = act("action=costs", f"format={form}", *SMALL)
    everything = act("action=costs", "format=all", *SMALL)
    assert out in everything == act("action=costs", *SMALL)
    assert len(out) < len(everything)
    if form == "json":
        named = {row["table"] for row in json.loads(out)}
        assert named == {"published", "full", "memory", "sparsity"}
    if form == "csv":
        first, second, memory, sparsity = (
            list(csv.DictReader(io.StringIO(block))) for block in out.split("\n\n")
        )
        assert [row["model"] for row in first] == [row["model"] for row in second]
        assert [row["method"] for row in memory] == ["full", "lora", "galore", "grass", "prompt"]
        assert sparsity[0]["total_gb"] == "112.0"
    if form == "markdown":
        assert all(line.startswith(("|", "#")) for line in out.splitlines() if line)


def test_an_unknown_format_of_costs_is_named() -> None:
    asked = ["action=costs", "format=xml"]
    with pytest.raises(
        ConfigError, match="format: expected one of markdown, csv, json, all, got 'xml'"
    ):
        actions.act(compose_run(asked), asked)


def test_a_run_in_the_directory_of_another_is_refused_before_anything_loads(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "preflight", lambda *_: pytest.fail("the directory comes first"))
    overrides = [*SMALL, "seed=5", f"out_dir={finished}"]
    with pytest.raises(ConfigError, match="holds a run with fingerprint"):
        actions.act(compose_run(overrides), overrides)


def test_only_simulations_of_a_sweep_need_a_superlink() -> None:
    with actions.sweep_superlink([compose_run(SMALL).config]) as superlink:
        assert superlink is None


def test_a_comparison_goes_to_the_sweeps_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actions.compare_sweep([finished, tmp_path / "absent"], tmp_path / "all")
    assert str(tmp_path / "all" / "comparison.md") in capsys.readouterr().err
    text = (tmp_path / "all" / "comparison.md").read_text()
    assert "absent" in text


@pytest.mark.parametrize("action", ["report", "evaluate"])
def test_a_setting_that_an_action_would_not_read_is_refused(
    action: str, act: Fixture, finished: Path
) -> None:
    with pytest.raises(ConfigError, match=f"action={action}: .* got seed=1"):
        act(f"action={action}", f"run={finished}", "seed=1")
