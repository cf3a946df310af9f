from collections import Counter

import pytest

from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks import reuters
from fedllm_flwr.tasks.base import TaskOptions


@pytest.mark.assets
def test_the_official_split_is_kept():
    task = reuters.load(TaskOptions(name="r8_topics"), 0)
    train, validation, test = (task.splits[name] for name in ("train", "validation", "test"))
    assert len(train) + len(validation) == 5485
    assert len(test) == 2189
    topics = Counter(row.label for row in train + validation)
    named = {task.label_names[label]: count for label, count in topics.items()}
    assert named == {
        "earn": 2840,
        "acq": 1596,
        "crude": 253,
        "trade": 251,
        "money-fx": 206,
        "interest": 190,
        "ship": 108,
        "grain": 41,
    }


@pytest.mark.assets
def test_validation_is_a_balanced_tenth_without_copies_of_training_texts():
    task = reuters.load(TaskOptions(name="r8_topics"), 0)
    train, validation = task.splits["train"], task.splits["validation"]
    assert len(validation) == pytest.approx(5485 / 10, abs=15)  # copies move together
    assert not {row.text for row in train} & {row.text for row in validation}
    share = Counter(row.label for row in validation)
    for label, count in Counter(row.label for row in train).items():
        assert share[label] == pytest.approx(count / 9, abs=6)
    other = reuters.load(TaskOptions(name="r8_topics"), 1)
    assert {row.row_id for row in validation} != {row.row_id for row in other.splits["validation"]}


@pytest.mark.assets
def test_rows_are_complete_and_have_one_word_targets():
    task = reuters.load(TaskOptions(name="r8_topics"), 0)
    rows = [row for rows in task.splits.values() for row in rows]
    assert len({row.row_id for row in rows}) == len(rows) == 7674
    for row in rows:
        assert row.text == row.text.strip() != ""
        assert row.target == task.label_words[row.label]
        assert " " not in row.target


def test_an_unknown_topic_names_file_line_and_column(tmp_path, monkeypatch):
    path = tmp_path / "reuters-r8-train.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\nearn\tprofit up\nsport\tgoal\n")
    monkeypatch.setattr(reuters, "locate", lambda *_: path)
    with pytest.raises(
        DataError, match=r"^reuters-r8-train\.tab, line 5, column Category: .* 'sport'$"
    ):
        reuters.read_split("train")
