import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.bag_of_words import majority, naive_bayes
from fedllm_flwr.tasks.base import Row, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.metrics import Counts


def rows(*pairs):
    return [Row(f"r{i}", text, str(label), label) for i, (text, label) in enumerate(pairs)]


TRAIN = rows(("red apple", 0), ("green apple", 0), ("red brick", 1), ("apple tart", 0))
VALIDATION = rows(("apple", 0), ("brick wall", 1))


def test_majority_scores_each_client():
    result = majority(TRAIN, [rows(("x", 0), ("y", 1)), [], rows(("z", 0))])
    assert result.clients == (Counts(1, 2), Counts(), Counts(1, 1))
    assert result.overall == Counts(2, 3)
    assert result.detail == "label 0"


def test_naive_bayes_learns_what_words_mean():
    tests = [rows(("some apple", 0)), rows(("a brick", 1), ("brick house", 1))]
    assert naive_bayes(TRAIN, VALIDATION, tests).clients == (Counts(1, 1), Counts(2, 2))


def test_test_rows_do_not_take_part_in_the_choice():
    tests = rows(("some apple", 1)), rows(("brick", 0))
    assert naive_bayes(TRAIN, VALIDATION, tests).detail == naive_bayes(TRAIN, VALIDATION, []).detail


def test_without_validation_rows_the_smoothest_words_are_used():
    assert naive_bayes(TRAIN, [], [VALIDATION]).detail == "words, smoothing 1"


def test_one_label_and_unknown_words_still_give_an_answer():
    result = naive_bayes(TRAIN[:2], [], [rows(("zebra", 0), ("apple", 1))])
    assert result.overall == Counts(1, 2)


@pytest.mark.parametrize("baseline", [majority, lambda train, tests: naive_bayes(train, [], tests)])
def test_rows_without_labels_are_refused(baseline):
    with pytest.raises(ConfigError, match=r"expected a label for every row, row r has none$"):
        baseline([Row("r", "text", "free text")], [])
    with pytest.raises(ConfigError, match=r"expected training rows, got none$"):
        baseline([], [])


def test_texts_without_words_are_refused():
    with pytest.raises(ConfigError, match=r"expected words in the training texts"):
        naive_bayes(rows(("?", 0), ("!", 1)), [], [])


@pytest.mark.assets
@pytest.mark.slow
def test_reuters_is_easy_for_a_bag_of_words():
    # Published multinomial naive Bayes on R8 is 0.96 (Cardoso-Cachopo 2007); the majority is 0.495.
    splits = load_task(TaskOptions(name="r8_topics"), 0).splits
    result = naive_bayes(splits["train"], splits["validation"], [splits["test"]])
    assert 0.94 < result.overall.accuracy < 0.98
    assert majority(splits["train"], [splits["test"]]).overall == Counts(1083, 2189)
