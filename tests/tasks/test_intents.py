from collections import Counter

import pytest

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.tasks import intents
from fedllm_flwr.tasks.base import TaskOptions


@pytest.mark.assets
def test_every_cell_has_the_same_number_of_rows():
    task = intents.load(TaskOptions(name="intents"), 0)
    for split, rows in task.splits.items():
        cells = Counter((row.group, row.label) for row in rows)
        assert len(cells) == 8 * 8
        assert set(cells.values()) == {intents.CELL_ROWS[split]}
        assert all(row.client == row.group for row in rows)
        assert all(row.target == task.label_words[row.label] for row in rows)
    rows = [row for rows in task.splits.values() for row in rows]
    assert len({row.row_id for row in rows}) == len(rows) == 64 * 48


@pytest.mark.assets
def test_no_sentence_is_in_two_splits_of_its_cell():
    task = intents.load(TaskOptions(name="intents", languages=("en", "it")), 3)
    seen = Counter(
        (row.group, row.label, row.text) for rows in task.splits.values() for row in rows
    )
    assert set(seen.values()) == {1}
    assert {group for group, _, _ in seen} == {"en", "it"}


@pytest.mark.assets
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_test_templates_are_not_trained_except_in_the_two_single_template_cells(seed):
    shared = set()
    for language in intents.LANGUAGES:
        grammar = intents.Grammar(language)
        for intent, word in intents.INTENTS.items():
            patterns = grammar.patterns(intent)
            trained, tested = intents.split_patterns(grammar, patterns, seed)
            assert {id(p) for p in trained} | {id(p) for p in tested} == {id(p) for p in patterns}
            if {p.source for p in trained} & {p.source for p in tested}:
                shared.add((language, word))
    assert shared == {("it", "vacuum"), ("ar", "vacuum")}


@pytest.mark.assets
def test_sentences_have_no_open_slot_and_follow_the_seed():
    first = intents.load(TaskOptions(name="intents", languages=("de",)), 0)
    again = intents.load(TaskOptions(name="intents", languages=("de",)), 0)
    other = intents.load(TaskOptions(name="intents", languages=("de",)), 1)
    assert first.splits == again.splits
    assert first.splits != other.splits
    for row in first.splits["train"]:
        assert not set(row.text) & set("[](){}<>|;")


@pytest.mark.assets
def test_a_cell_that_cannot_be_filled_is_named(monkeypatch):
    monkeypatch.setattr(intents, "CELL_ROWS", {"train": 24, "validation": 8, "test": 500})
    monkeypatch.setattr(intents, "ATTEMPTS_PER_ROW", 20)
    monkeypatch.setattr(intents, "INTENTS", {"HassGetWeather": "weather"})
    message = r"pl\.json, HassGetWeather: expected templates that give 500 test sentences, got \d+$"
    with pytest.raises(DataError, match=message):
        intents.load(TaskOptions(name="intents", languages=("pl",)), 0)


def test_an_unknown_language_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^task\.languages: expected some of en, de, .* got 'xx'$"
    ):
        intents.load(TaskOptions(name="intents", languages=("en", "xx")), 0)
