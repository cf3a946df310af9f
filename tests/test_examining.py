from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.questions import Questions
from clients.workspace import open_workspace
from fedllm_flwr.config import run_config
from fedllm_flwr.core import run, whole_json
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.examining import (
    Question,
    adaptation_of,
    examine_run,
    read_figures,
    read_material,
    write_question,
)
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.server_app import serve
from fedllm_flwr.unlearning.questions import Plan

Fixture = Callable[..., Any]
PLAN = Plan(8, 8, reworded=1, paired=1, probed=2, candidates=0, relearn_steps=(1,), seed=2)


@pytest.fixture(scope="module")
def finished(
    micro: Fixture,
    facts_run: tuple[str, ...],
    edge_grid: Fixture,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDirectory:
    """A run of two clients with facts, to its end."""
    folder = tmp_path_factory.mktemp("facts") / "run"
    config = micro(*facts_run, "num_rounds=1", "evaluate_every=1")
    run(edge_grid(2), replace(config, out_dir=str(folder)), str(folder))
    return RunDirectory.open(folder)


def test_a_flower_run_answers_a_question_into_its_folder(
    finished: RunDirectory, edge_grid: Fixture, tmp_path: Path
) -> None:
    source = str(finished.path)
    grid = edge_grid(2, node_config={"forget": "1"})
    write_question(tmp_path / "material", Question(source, 1))
    write_question(tmp_path / "asked", Question(source, 1, PLAN))
    for name in ("material", "asked"):
        words = f"action=examine run={source} out_dir={tmp_path / name}"
        context = Context(1, 1, {}, RecordDict(), {"experiment": "", "overrides": words})
        serve(grid, context, None)
    config = run_config(finished.manifest["config"])
    questions = Questions(open_workspace(whole_json(config)), 1)
    model = adaptation_of(finished, config)
    assert read_material(tmp_path / "material") == questions.material
    wanted = questions.ask(model, PLAN)
    found = read_figures(tmp_path / "asked")
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    plain = questions.ask(replace(model, delta=None), PLAN)
    assert not np.allclose(plain["members/losses"], wanted["members/losses"]), (
        "it is the run's own model"
    )
    summary = RunDirectory.open(tmp_path / "asked").summary()
    assert summary["downlink_bytes"] > 4 * sum(d.left.size for d in model.delta.values())  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="expected an answered question with figures"):
        read_figures(tmp_path / "material")


def test_a_client_that_says_no_stops_it_and_the_folder_says_why(
    finished: RunDirectory, edge_grid: Fixture, tmp_path: Path
) -> None:
    runtime = run_config(finished.manifest["config"]).runtime
    write_question(tmp_path / "small", Question(str(finished.path), 1))
    small = replace(runtime, max_message_mb=1e-5, node_wait_seconds=0.1)
    with pytest.raises(
        RunStoppedError, match="0 of unknown places are taken"
    ):  # every answer is too large
        examine_run(
            edge_grid(2), str(finished.path), str(tmp_path / "small"), small,
            ["runtime.max_message_mb=1e-5", "runtime.node_wait_seconds=0.1"],
        )  # fmt: skip
    write_question(tmp_path / "q", Question(str(finished.path), 1))
    with pytest.raises(RunStoppedError, match="expected one that has asked to be forgotten"):
        examine_run(edge_grid(2), str(finished.path), str(tmp_path / "q"), runtime, [])
    [event] = RunDirectory.open(tmp_path / "q").records("event")
    assert event["text"].startswith("stopped: client 1: expected one that has asked")
    with pytest.raises(ConfigError, match="expected a folder with a question, got another run"):
        examine_run(edge_grid(2), str(finished.path), str(finished.path), runtime, [])
