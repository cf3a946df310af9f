"""Replays of recorded answers; chains that are asked now are in test_cascading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError

Fixture = Callable[..., Any]


def recorded(folder: Path, *more: dict[str, Any]) -> Path:
    """Two queries: the first tier's three members agree on the first and are wrong on the second."""
    rows = []
    for query, said in (("q1", "aab"), ("q2", "bbb")):
        rows += [
            {"query": query, "tier": "small", "member": m, "answer": answer, "correct": answer == "a",
             "input_tokens": 10, "output_tokens": 1}
            for m, answer in enumerate(said)
        ]  # fmt: skip
        rows.append({**rows[-1], "tier": "large", "member": "L", "answer": "A", "correct": True})
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *more)))
    return path


def test_a_replay_prints_one_list_of_rows(act: Fixture, tmp_path: Path) -> None:
    rows = json.loads(act("action=cascade", f"replay={recorded(tmp_path)}", "format=json"))
    by_method = {(row["method"], row["theta"]): row for row in rows if row["table"] == "curve"}
    for method, correct, cost in (
        ("always_first", 1, 66),
        ("always_last", 2, 22),
        ("oracle", 2, 44),
    ):
        assert (by_method[method, None]["correct"], by_method[method, None]["cost"]) == (
            correct,
            cost,
        )
    strict = by_method["cascade", 1.0]
    assert (strict["correct"], strict["deferral_rate"], strict["cost"]) == (1, 0.5, 77)
    assert [tier["cost"] for tier in strict["tiers"]] == [66, 11]


def test_a_replay_has_prices_formats_and_a_seed(act: Fixture, tmp_path: Path) -> None:
    asked = ["action=cascade", f"replay={recorded(tmp_path)}", "prices=[small:0.1/0.2,large:1/2]"]
    plain = act(*asked)
    assert plain.startswith("## Accuracy and cost")
    assert "| always_first | – | 1 | 0.5 |" in plain
    everything = act(*asked, "format=all", "seed=3")
    for form in ("csv", "json"):
        assert act(*asked, f"format={form}", "seed=3") in everything
    row = json.loads(act(*asked, "format=json"))[0]
    assert row["tiers"][0]["cost"] == 7.2, "6 answers of 10 tokens at 0.1 and 1 at 0.2"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], r"needs replay=<JSON Lines file of answers>, or two or more cascade.tiers, got none"),
        (["replay=absent.jsonl"], r"data file absent\.jsonl: expected a readable file"),
        (["replay={file}", "format=xml"], r"format: expected one of markdown, csv, json, all, got 'xml'"),
        (["replay={file}", "model=tiny"], r"only replay=, prices=, format= and seed=, got model=tiny"),
        (["replay={file}", "run=x"], r"only replay=, .* got run=x"),
        (["replay={file}", "prices=[small:1/1]"], r"prices: .* got none for 'large'"),
        (["replay={bad}"], r"answers\.jsonl, line 9, field 'correct': expected true or false, got 'yes'"),
    ],
)  # fmt: skip
def test_a_replay_that_cannot_be_is_named(more: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    odd = {"query": "q3", "tier": "small", "member": 0, "answer": "a", "correct": "yes", "input_tokens": 1,
           "output_tokens": 1}  # fmt: skip
    files = {"file": recorded(tmp_path), "bad": recorded(tmp_path / "bad", odd)}
    asked = ["action=cascade", *(word.format(**files) for word in more)]
    with pytest.raises(ConfigError, match=message):
        actions.act(compose_run(asked), asked)
