import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.cascade import ROUGE_L
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.semantic_chain import first_line, similarity_named

Fixture = Callable[..., Any]
MEMBERS = "members:[{model:tiny,name:a},{model:tiny,name:b}]"
LAST = ",{name:large,members:[{model:tiny}],max_new_tokens:6}]"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A task of free texts from a file."""
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"say w{n} w{n + 1}", "response": f"w{n} w{n + 1}"} for n in range(40)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tiers = f"cascade.tiers=[{{name:small,{MEMBERS},max_new_tokens:6,price_in:0.1}}{LAST}"
    return [
        "experiment=smoke", "action=cascade", "task=jsonl", "task.loss=vocabulary", "task.test_rows=6",
        "task.validation_rows=-1", "cascade.agreement=rouge_l", f"runtime.data_path={file}", "format=json",
        f"out_dir={tmp_path / 'out'}", tiers,
    ]  # fmt: skip


def test_clones_write_the_same_and_their_texts_are_kept(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert actions.act(compose_run(words), words) == 0
    rows = json.loads(capsys.readouterr().out)
    curve = [row for row in rows if row["table"] == "curve"]
    semantic = [row for row in curve if row["method"] == "semantic"]
    assert semantic[-1]["theta"] in (1.0, 0.0)
    first, one = (
        next(r for r in curve if r["method"] == m) for m in ("always_first", "one_member")
    )
    assert first["quality"] == one["quality"], "the medoid of two clones is either"
    assert first["cost"] == pytest.approx(2 * one["cost"])
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 3 * len({line["query"] for line in lines}) > 3
    pairs = {(line["query"], line["member"]): line for line in lines if line["tier"] == "small"}
    for query, member in pairs:
        assert pairs[query, member]["text"] == pairs[query, "a"]["text"]
    assert all(0 < line["score"] <= 1 for line in lines)
    assert json.loads((tmp_path / "out" / "curve.json").read_text()) == rows


def test_what_it_is_not_for_is_refused(words: list[str], tmp_path: Path) -> None:
    def acted(*more: str) -> None:
        given = [word for word in (*words, *more) if not word.startswith("format=")]
        actions.act(compose_run(given), given)

    labels = [w for w in words if not w.startswith(("task", "runtime"))]
    with pytest.raises(ConfigError, match="task=synthetic: labels are compared by votes"):
        actions.act(compose_run(labels), labels)
    single = "cascade.tiers.0.members=[{model:tiny}]"
    with pytest.raises(
        ConfigError, match="expected two members or more in the first tier, got one"
    ):
        acted(single)
    clusters = "cascade.tiers.1.members=[{run:x,clusters:true}]"
    for action in ("query", "serve"):
        with pytest.raises(ConfigError, match=f"action={action} takes votes"):
            acted(f"action={action}", "cascade.thetas=[1]")
        with pytest.raises(
            ConfigError, match=f"x with clusters=true: .* of action={action} have none"
        ):
            acted(f"action={action}", "cascade.thetas=[1]", "cascade.agreement=vote", clusters)


def test_the_first_line_that_says_something_counts() -> None:
    assert first_line("\n  A title. \nMore") == "A title."
    assert first_line(" \n") is first_line(None) is None


def test_similarities_are_named() -> None:
    assert similarity_named("rouge_l") is ROUGE_L
