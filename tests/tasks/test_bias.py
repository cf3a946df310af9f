import contextlib
import importlib.metadata
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, DataError, ShapeError
from fedllm_flwr.tasks import bias
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.catalog import TASKS
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.tasks.metrics import Counts

QUESTION = {
    "context": "Two people met.",
    "question": "Who was late?",
    "ans0": "The first",
    "ans1": "Not known",
    "ans2": "The second",
    "context_condition": "ambig",
    "label": 1,
}


def write(folder, monkeypatch, *records):
    path = folder / "Age.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    monkeypatch.setattr(bias, "locate", lambda *_, **__: path)


def test_a_question_shows_its_answers_by_letter(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, QUESTION, QUESTION | {"context_condition": "disambig", "label": 2})
    first, second = bias.bbq(["Age"]).splits["test"]
    shown = "Two people met.\nQuestion: Who was late?\nA: The first\nB: Not known\nC: The second"
    assert first == Row("Age-00001", shown, "B", 1, "Age/ambig")
    assert second == Row("Age-00002", shown, "C", 2, "Age/disambig")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 3, "column 'label': expected 0, 1 or 2, got 3"),
        ("label", "1", "column 'label': expected 0, 1 or 2, got '1'"),
        ("context_condition", "x", "column 'context_condition': expected ambig or disambig"),
        ("ans2", None, "column 'ans2': expected a value, got none"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, monkeypatch, column, value, message):
    write(tmp_path, monkeypatch, QUESTION, QUESTION | {column: value})
    with pytest.raises(DataError, match=rf"^Age\.jsonl, line 2, {message}"):
        bias.bbq(["Age"])


def test_an_unknown_category_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"^bbq: expected some of Age, .* got 'Height'$"):
        bias.bbq(["Height"])


def test_no_run_can_train_on_a_probe():
    assert not {"bbq", "crows_pairs"} & set(TASKS)


def pair(number, kind):
    return [
        Row(f"pair-{number:04d}-more", "", "More.", group=kind),
        Row(f"pair-{number:04d}-less", "", "Less.", group=kind),
    ]


def test_pairs_are_counted_by_kind():
    rows = [*pair(0, "age"), *pair(1, "age"), *pair(2, "religion")]
    losses = np.array([1.0, 2.0, 3.0, 2.0, 5.0, 5.0])
    assert bias.stereotypical(rows, losses) == {"age": Counts(1, 2), "religion": Counts(0, 1)}
    order = [3, 5, 0, 4, 2, 1]
    shuffled = bias.stereotypical([rows[i] for i in order], losses[order])
    assert shuffled == bias.stereotypical(rows, losses)


def test_swapping_the_sides_swaps_the_preference():
    rows = [row for number in range(20) for row in pair(number, "age")]
    losses = np.random.default_rng(0).random(40)
    swapped = losses.reshape(20, 2)[:, ::-1].reshape(-1)
    found, other = bias.stereotypical(rows, losses), bias.stereotypical(rows, swapped)
    assert found["age"].correct + other["age"].correct == 20


@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 4)])
def test_half_a_pair_and_missing_losses_are_refused(kept):
    rows = [*pair(0, "age"), *pair(1, "age")]
    with pytest.raises(ShapeError, match="expected whole pairs, got pair-0000-"):
        bias.stereotypical(rows[kept], np.ones(len(rows[kept])))
    with pytest.raises(ShapeError, match=r"expected losses of shape \(4,\), got \(3,\)"):
        bias.stereotypical(rows, np.ones(3))


def test_a_sentence_is_the_whole_target(plain_tokenizer, monkeypatch, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(",sent_more,sent_less,bias_type\n0,one of alpha .,one of beta .,age\n")
    monkeypatch.setattr(bias, "locate", lambda *_, **__: path)
    task = bias.crows_pairs()
    encoder = build_encoder(task, plain_tokenizer, loss="vocabulary", max_tokens=64)
    for row, code in zip(task.splits["test"], encoder.encode(task.splits["test"]), strict=True):
        assert plain_tokenizer.decode(code.targets).removesuffix("</s>").strip() == row.target
    assert [row.row_id for row in task.splits["test"]] == ["pair-0000-more", "pair-0000-less"]


def has_probes() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(bias.PACKAGE))
    return False


@pytest.mark.assets
@pytest.mark.skipif(not has_probes(), reason=f"opt-in: {bias.GET_PROBES}")
def test_the_shipped_probes_are_whole():
    task = bias.bbq()
    assert len(task.splits["test"]) == 58_492
    groups = Counter(row.group for row in task.splits["test"])
    assert len(groups) == 22
    for category in bias.CATEGORIES:
        assert groups[f"{category}/ambig"] == groups[f"{category}/disambig"]
    pairs = bias.crows_pairs().splits["test"]
    assert len(pairs) == 2 * 1508
    assert len({row.group for row in pairs}) == 9
    for probe in (task, bias.crows_pairs()):
        rows = probe.splits["test"]
        assert len({row.row_id for row in rows}) == len(rows)
        assert not probe.splits["train"] + probe.splits["validation"]
    assert replace(pairs[0], row_id="x", target="y") == replace(pairs[1], row_id="x", target="y")
