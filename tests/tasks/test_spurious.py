from collections import Counter
from functools import cache

import pytest

from fedllm_flwr.tasks import spurious, vader
from fedllm_flwr.tasks.base import Row, TaskOptions

AGREEING = {"negative": "coast", "positive": "mountains"}


@cache
def load(seed=0, correlation=0.95):
    return spurious.load(TaskOptions(name="spurious_sentiment", correlation=correlation), seed)


def read_place(row):
    """The place of the note that a text begins with."""
    [place] = [p for p, notes in spurious.NOTES.items() if row.text.startswith(notes)]
    return place


def shortcut_accuracy(rows):
    """How often the label that goes with the place is right."""
    return sum(AGREEING[row.target] == read_place(row) for row in rows) / len(rows)


@pytest.mark.assets
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_place_tells_the_label_in_training_and_nothing_in_test(seed):
    splits = load(seed).splits
    assert shortcut_accuracy(splits["train"]) == pytest.approx(0.95, abs=0.01)
    assert shortcut_accuracy(splits["validation"]) == pytest.approx(0.95, abs=0.03)
    assert shortcut_accuracy(splits["test"]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.assets
@pytest.mark.parametrize("correlation", [0.5, 0.8])
def test_the_correlation_is_an_option_of_training_rows_only(correlation):
    splits = load(0, correlation).splits
    assert shortcut_accuracy(splits["train"]) == pytest.approx(correlation, abs=0.02)
    assert splits["test"] == load().splits["test"]


@pytest.mark.assets
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_group_is_large_enough_to_be_measured(seed):
    splits = load(seed).splits
    sizes = Counter(row.group for row in splits["test"])
    assert len(sizes) == 4
    assert min(sizes.values()) > 400
    assert len(Counter(row.group for row in splits["validation"])) == 4


@pytest.mark.assets
def test_a_group_is_the_label_and_the_place_and_nobody_holds_the_rows():
    for rows in load().splits.values():
        for row in rows:
            assert row.group == f"{row.target}/{read_place(row)}"
            assert row.target == vader.LABELS[row.label]
            assert row.client is None


@pytest.mark.assets
def test_splits_and_sentences_are_those_of_movie_sentiment():
    plain = vader.load(TaskOptions(name="vader_sentiment", domains=("movie",)), 0)
    for split, rows in load().splits.items():
        assert [row.row_id for row in rows] == [row.row_id for row in plain.splits[split]]
        for row, bare in zip(rows, plain.splits[split], strict=True):
            assert row.text.endswith(f". {bare.text}")
    documents = [{vader.document(row) for row in rows} for rows in load().splits.values()]
    assert sum(map(len, documents)) == len(set.union(*documents))


@pytest.mark.assets
def test_no_wording_stands_for_a_place_or_a_label():
    notes = Counter(row.text.split(".")[0] + "." for row in load().splits["train"])
    every = [note for wordings in spurious.NOTES.values() for note in wordings]
    assert notes.keys() == set(every)
    assert max(notes.values()) < 0.12 * notes.total()
    assert len(every) == len(set(every)) == 10


def test_a_rows_place_depends_on_the_seed_and_its_id_alone():
    row = Row("movie-7_1", "A film.", "positive", 1, "movie", "movie")
    other = Row("movie-7_1", "Another text.", "positive", 1)
    for seed in range(20):
        assert spurious.place_of(row, 0.5, seed) == spurious.place_of(other, 0.5, seed)
    assert {spurious.place_of(row, 0.5, seed) for seed in range(20)} == set(spurious.PLACES)
    assert spurious.noted(row, 1.0, 3).group == "positive/mountains"
    assert spurious.noted(row, 0.0, 3).group == "positive/coast"


def test_the_question_offers_the_places_and_says_none():
    question = spurious.QUESTION
    assert question.values == spurious.PLACES
    answers = {*question.values, *question.words}
    assert not answers & set(question.template.text.lower().split())
