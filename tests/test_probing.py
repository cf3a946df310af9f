"""Probes of social bias, asked of what runs left; the probes' own files stand in by small ones of the same form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import actions, core, probing
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.probing import chosen_questions, probe_run
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.tasks import bias
from fedllm_flwr.tasks.base import Row

Fixture = Callable[..., Any]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions in each category, and three pairs."""
    question = {
        "context": "one of alpha .", "question": "who", "ans0": "alpha", "ans1": "beta", "ans2": "gamma",
    }  # fmt: skip
    asked = [
        {**question, "context_condition": "ambig", "label": 1},
        {**question, "context_condition": "disambig", "label": 0},
    ]
    folder = tmp_path / "probes"
    folder.mkdir()
    for category in bias.CATEGORIES:
        text = "\n".join(json.dumps(each) for each in asked)
        (folder / f"{category}.jsonl").write_text(text)
    pairs = "0,one of alpha .,beta .,age\n1,gamma .,one one .,age\n2,of of .,alpha of .,religion\n"
    (folder / "pairs.csv").write_text(",sent_more,sent_less,bias_type\n" + pairs)

    def locate(package: str, path: str, *, get: str) -> Path:
        return folder / ("pairs.csv" if path.endswith(".csv") else Path(path).name)

    monkeypatch.setattr(bias, "locate", locate)


@pytest.fixture(scope="module")
def run(
    micro: Fixture, edge_grid: Fixture, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A run whose adapter has moved far."""
    folder = tmp_path_factory.mktemp("probing") / "run"
    core.run(edge_grid(), micro("num_rounds=1", "optimizer.learning_rate=0.3"), folder)
    return RunDirectory.open(folder)


def test_both_models_answer_every_group(shipped: None, run: RunDirectory) -> None:
    found = probe_run(run, None, "bbq")
    names = [f"{c}/{k}" for c in sorted(bias.CATEGORIES) for k in bias.CONDITIONS]
    for model in ("exported", "plain"):
        own = [record for record in found if record["model"] == model]
        assert [record["group"] for record in own] == [*names, "all"]
        assert [record["rows"] for record in own] == [1] * 22 + [22]
        assert own[-1]["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in own[:-1]]))
        assert all(record["probe"] == "bbq" for record in own)


def test_the_exported_model_is_asked_and_not_the_plain_one_twice(
    shipped: None, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, with and without the adapter: other losses, and the backbone plain again afterwards."""
    seen: list[np.ndarray] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = scores(*args, **kwargs)
        seen.append(result[0])
        return result

    scores = probing.row_scores
    monkeypatch.setattr(probing, "row_scores", spy)
    found = probe_run(run, None, "crows_pairs")
    [exported, plain] = seen
    assert len(exported) == 6
    assert np.abs(exported - plain).max() > 0.01
    assert [record["group"] for record in found] == ["age", "religion", "all"] * 2
    assert [record["rows"] for record in found] == [2, 1, 3] * 2
    for record, losses in ((found[2], exported), (found[5], plain)):
        more, less = losses[0::2], losses[1::2]
        assert record["stereotypical"] == pytest.approx(np.mean(more < less))


def test_the_command_prints_one_json_list(
    shipped: None, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["action=evaluate", f"run={run.path}", "probe=crows_pairs"]
    assert actions.act(compose_run(asked), asked) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_what_cannot_be_probed_is_refused(
    shipped: None, run: RunDirectory, micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="probe: expected bbq or crows_pairs, got 'winobias'"):
        probe_run(run, None, "winobias")
    with pytest.raises(
        ConfigError, match="probe=bbq: expected with action=evaluate, got action=report"
    ):
        compose_run(["action=report", "probe=bbq"])
    core.run(edge_grid(), micro("method=fedprompt", "num_rounds=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match="stands behind the question of the run's own task"):
        probe_run(RunDirectory.open(tmp_path / "run"), None, "bbq")


def test_questions_are_drawn_once_for_all_runs_and_evenly() -> None:
    rows = tuple(Row(f"r{i}", "", "A", 0, group=f"g{i % 3}") for i in range(300))
    chosen = chosen_questions(rows)
    assert chosen == chosen_questions(rows)
    assert [row.group for row in chosen].count("g1") == probing.QUESTIONS == len(chosen) // 3
    assert [int(row.row_id[1:]) for row in chosen] == sorted(int(r.row_id[1:]) for r in chosen)
    assert chosen_questions(rows[:9]) == list(rows[:9])
