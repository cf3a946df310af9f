import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import core, records
from fedllm_flwr.comparison import (
    add_baselines,
    best_learning_rate,
    predictor_baselines,
    task_kind,
)
from fedllm_flwr.journal import Journal
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.tasks.bag_of_words import majority, naive_bayes
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import partition
from strategies import Hosting

Fixture = Callable[..., Any]
RATES = "baselines.learning_rates=[1e-5,0.02]"
SHORT = ("num_rounds=1", "baselines=all", RATES)


class Stage:
    """A grid, a journal and a configuration, as :mod:`fedllm_flwr.core` brings them together."""

    def __init__(self, config: Any, grid: Any, run: RunDirectory) -> None:
        self.config, self.grid, self.run = config, grid, run
        self.journal = Journal(run, config, Progress(StringIO()))
        self.hosting = Hosting(grid, 1.0, self.journal.note, self.journal.count)
        self.hosting.refresh()

    @property
    def trained(self) -> int:
        return len([m for m in self.grid.sent if m.metadata.message_type == "train"])

    def compare(self) -> dict[str, float]:
        predictor_baselines(self.config, self.journal)
        kind = task_kind(self.config)
        names = ("federated", "local_only", "centralised")
        rates = {
            n: best_learning_rate(self.config, self.hosting, self.journal, n, kind) for n in names
        }
        add_baselines(
            self.config,
            self.hosting,
            self.journal,
            kind,
            ("zero_shot", "local_only", "centralised"),
        )
        return rates


@pytest.fixture(scope="module")
def compared(
    micro: Fixture, edge_grid: Fixture, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Stage, dict[str, float]]:
    run = RunDirectory.create(tmp_path_factory.mktemp("compare") / "run", {})
    stage = Stage(micro(*SHORT), edge_grid(), run)
    return stage, stage.compare()


def test_every_baseline_is_there_once(compared: Any) -> None:
    stage, _ = compared
    names = [record["name"] for record in stage.run.records("baseline")]
    assert names == ["majority", "bag_of_words", "zero_shot", "local_only", "centralised"]
    assert all(0 <= record["accuracy"] <= 1 for record in stage.run.records("baseline"))


def test_each_method_has_its_own_rate_chosen_on_validation_rows(compared: Any) -> None:
    stage, rates = compared
    tried = {}
    for record in stage.run.records("tuning"):
        tried.setdefault(record["name"], {})[record["learning_rate"]] = record["score"]
    assert set(tried) == {"federated", "local_only", "centralised"}
    for name, scores in tried.items():
        assert set(scores) == {1e-5, 0.02}
        assert rates[name] == max(scores, key=lambda rate: scores[rate])
    used = {
        b["name"]: b["learning_rate"] for b in stage.run.records("baseline") if "learning_rate" in b
    }
    assert used == {name: rates[name] for name in ("local_only", "centralised")}


def test_no_test_row_takes_part_in_a_choice(compared: Any) -> None:
    stage, _ = compared
    asked = [json.loads(m.content["instruction"]["body"]) for m in stage.grid.sent]
    splits = [tuple(body["splits"]) for body in asked if "splits" in body]
    tuning = 3 * 2  # three methods, two rates
    first_test = splits.index(("test",))
    assert set(splits[:first_test]) == {("validation",)}
    assert first_test >= 2 * tuning


def test_on_resume_nothing_is_measured_again(compared: Any, edge_grid: Fixture) -> None:
    stage, rates = compared
    before = stage.run.records()
    again = Stage(stage.config, edge_grid(), RunDirectory.open(stage.run.path))
    assert again.compare() == rates
    assert again.trained == 0
    assert again.run.records() == before


def test_a_choice_that_was_interrupted_goes_on_with_what_is_left(
    compared: Any, edge_grid: Fixture, tmp_path: Path
) -> None:
    stage, rates = compared
    run = RunDirectory.create(tmp_path / "run", {})
    kept = [r for r in stage.run.records("tuning") if r["name"] == "federated"][:1]
    run.append(kept[0])
    again = Stage(stage.config, edge_grid(), run)
    kind = task_kind(stage.config)
    assert (
        best_learning_rate(again.config, again.hosting, again.journal, "federated", kind)
        == rates["federated"]
    )
    assert again.trained == 2, "one rate, one round, two nodes"
    assert run.records("tuning") == [
        r for r in stage.run.records("tuning") if r["name"] == "federated"
    ]


def test_a_trial_may_take_fewer_rows_than_the_run(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("num_rounds=1", RATES, "baselines.tuning_rows=2")
    stage = Stage(config, edge_grid(), RunDirectory.create(tmp_path / "run", {}))
    best_learning_rate(config, stage.hosting, stage.journal, "federated", "classification")
    asked = [json.loads(m.content["instruction"]["body"]) for m in stage.grid.sent
             if m.metadata.message_type == "train"]  # fmt: skip
    configs = [body["config"] for body in asked]
    assert {c["partition"]["max_train_rows_per_client"] for c in configs} == {2}
    assert config.partition.max_train_rows_per_client != 2, "the run keeps its own"


def test_a_rate_that_breaks_training_down_is_the_worst_of_all(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("num_rounds=1", "client.local_steps=3",
                   "baselines.learning_rates=[3e38,0.02]")  # fmt: skip
    run = RunDirectory.create(tmp_path / "run", {})
    for attempt in range(2):
        stage = Stage(config, edge_grid(), RunDirectory.open(run.path))
        found = best_learning_rate(
            config, stage.hosting, stage.journal, "federated", "classification"
        )
        assert found == 0.02, f"attempt {attempt}"
    tried = {record["learning_rate"]: record["score"] for record in run.records("tuning")}
    assert tried[3e38] is None
    assert math.isfinite(tried[0.02])


def test_where_no_rate_can_be_judged_the_run_says_so(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("num_rounds=1", "baselines.learning_rates=[3e38,2e38]")
    run = RunDirectory.create(tmp_path / "run", {})
    stage = Stage(config, edge_grid(), run)
    kind = "classification"
    found = best_learning_rate(config, stage.hosting, stage.journal, "federated", kind)
    assert found == 3e38
    assert "no learning rate has a figure on validation rows" in run.records("event")[-1]["text"]


def test_without_rates_to_try_the_configured_one_is_used(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    stage = Stage(micro(), edge_grid(), RunDirectory.create(tmp_path / "run", {}))
    assert best_learning_rate(stage.config, stage.hosting, stage.journal, "federated", "x") == 0.02
    assert stage.trained == 0


def test_predictors_learn_from_the_rows_that_the_clients_train_on(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("baselines=quick", "partition.max_train_rows_per_client=3")
    stage = Stage(config, edge_grid(), RunDirectory.create(tmp_path / "run", {}))
    predictor_baselines(config, stage.journal)
    clients = partition(load_task(config.task.options(""), 0), config.partition, 0)
    train = [row for client in clients for row in client.train]
    assert len(train) <= 12
    validation = [row for client in clients for row in client.validation]
    tests = [client.test for client in clients]
    records_of = {record["name"]: record for record in stage.run.records("baseline")}
    clients_figures = {"worst_client_accuracy", "worst_decile_accuracy", "mean_client_accuracy"}
    assert all(clients_figures <= set(record) for record in records_of.values())
    found = {name: record["accuracy"] for name, record in records_of.items()}
    assert found == {
        "majority": majority(train, tests).overall.accuracy,
        "bag_of_words": naive_bayes(train, validation, tests).overall.accuracy,
    }


def test_a_predictor_that_is_missing_is_added_alone(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    stage = Stage(micro("baselines=quick"), edge_grid(), RunDirectory.create(tmp_path / "run", {}))
    stage.run.append({"kind": "baseline", "name": "majority", "accuracy": 0.5})
    predictor_baselines(stage.config, stage.journal)
    assert [b["name"] for b in stage.run.records("baseline")] == ["majority", "bag_of_words"]
    assert stage.run.records("baseline")[0]["accuracy"] == 0.5


@pytest.mark.parametrize(
    "overrides", [("baselines=none",), ("baselines=quick", "runtime=deployment")]
)
def test_predictors_need_to_be_wanted_and_need_the_rows(
    overrides: tuple[str, ...], micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    stage = Stage(micro(*overrides), edge_grid(), RunDirectory.create(tmp_path / "run", {}))
    predictor_baselines(stage.config, stage.journal)
    add_baselines(
        micro("baselines=none"), stage.hosting, stage.journal, "classification", ("zero_shot",)
    )
    assert stage.run.records("baseline") == []


OWN = ("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0")


def test_a_users_file_decides_the_kind_by_its_columns(micro: Fixture, tmp_path: Path) -> None:
    labels = "text,label\n" + "".join(f"row {n},{'yes' if n % 2 else 'no'}\n" for n in range(20))
    answers = "prompt,response\n" + "".join(f"row {n},answer {n}\n" for n in range(20))
    for content, kind in ((labels, "classification"), (answers, "instruction")):
        file = tmp_path / f"{kind}.csv"
        file.write_text(content)
        assert task_kind(micro(*OWN, "task.loss=vocabulary", f"runtime.data_path={file}")) == kind
    for loss, kind in (("labels", "classification"), ("vocabulary", "instruction")):
        assert task_kind(micro(*OWN, f"task.loss={loss}", "runtime=deployment")) == kind
    assert task_kind(micro()) == "classification"
    assert task_kind(micro("task=headlines", "task.loss=vocabulary")) == "instruction"


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompted(
    micro: Callable[..., Any],
    edge_grid: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """A run of prompts with every baseline."""
    folder = tmp_path_factory.mktemp("prompted") / "run"
    config = micro("method=fedprompt", "method.personal_length=2", "fairness.groups=data", "num_rounds=1",
                   "baselines=all", "baselines.templates=true", "baselines.local_tuning=true",
                   "baselines.local_tuning_steps=12", "baselines.learning_rates=[0.001,0.1]",
                   "task.test_rows=160", "task.validation_rows=40")  # fmt: skip
    grid = edge_grid()
    summary = core.run(grid, config, folder)
    return grid, summary, RunDirectory.open(folder)


def test_prompts_have_every_baseline_with_figures_of_clients_and_groups(prompted: Any) -> None:
    _, summary, run = prompted
    found = {record["name"]: record for record in run.records("baseline")}
    assert set(found) == {
        "majority", "bag_of_words", "zero_shot", "template_topic", "template_about", "template_read",
        "local_only", "centralised",
        "local_tuning",
    }  # fmt: skip
    for name in set(found) - {"majority", "bag_of_words"}:
        assert {"accuracy", "worst_decile_accuracy", "worst_group_accuracy"} <= set(found[name]), (
            name
        )
    assert summary["worst_group_accuracy"] <= summary["accuracy"]
    assert {"local_tuning_worst_group_accuracy", "local_accuracy"} <= set(summary)


def test_each_trained_baseline_has_a_rate_of_its_own(prompted: Any) -> None:
    _, summary, run = prompted
    tried: dict[str, dict[float, float]] = {}
    for record in run.records("tuning"):
        tried.setdefault(record["name"], {})[record["learning_rate"]] = record["score"]
    assert set(tried) == {"federated", "local_only", "centralised"}
    for name, scores in tried.items():
        assert set(scores) == {0.001, 0.1}, name
    assert summary["learning_rate"] == max(tried["federated"], key=lambda r: tried["federated"][r])


def test_the_zero_shot_prompt_is_one_of_the_hard_prompts(prompted: Any) -> None:
    _, _, run = prompted
    found = {record["name"]: record for record in run.records("baseline")}
    chosen = found["zero_shot"]["detail"].removeprefix("template ").split(",")[0]
    assert found["zero_shot"]["accuracy"] == found[f"template_{chosen}"]["accuracy"]
    assert found["zero_shot"]["loss"] == found[f"template_{chosen}"]["loss"]


def test_tuning_by_each_client_sends_no_adapter_back(prompted: Any) -> None:
    grid, _, _ = prompted
    bodies = [(records.read_body(m), m) for m in grid.sent if m.metadata.message_type == "evaluate"]
    tuned = [m for body, m in bodies if "tune-steps" in body]
    assert len(tuned) == 2 * 3, (
        "two nodes: two rates on validation rows, then the better on test rows"
    )
    asked = {m.metadata.message_id for m in tuned}
    replies = [r for r in grid.replies if r.metadata.reply_to_message_id in asked]
    assert all("arrays" not in r.content for r in replies)
