import csv
import json
from collections import Counter

import pytest

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.user_files import load_csv, load_json_lines


@pytest.fixture
def load(tmp_path):
    """Write records as CSV or JSON Lines and load them."""

    def write_and_load(records, *, kind="csv", seed=0, **options):
        path = tmp_path / f"own.{kind}"
        if kind == "csv":
            with path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        loader = load_csv if kind == "csv" else load_json_lines
        return loader(TaskOptions(name=kind, data_path=str(path), **options), seed)

    return write_and_load


def labelled(count=60):
    return [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(count)]


def prompted(count=40):
    return [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(count)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_both_formats_give_the_same_task(load, kind):
    task = load(labelled(), kind=kind)
    assert task.kind == "classification"
    assert task.label_names == task.label_words == ("a", "b")
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 48,
        "validation": 6,
        "test": 6,
    }
    for rows in task.splits.values():
        assert Counter(row.target for row in rows) == {"a": len(rows) / 2, "b": len(rows) / 2}
        assert all(row.target == task.label_names[row.label] for row in rows)
        assert {(row.client, row.group) for row in rows} == {(None, None)}


def test_prompts_and_responses_are_an_instruction_task(load):
    task = load(prompted(), kind="jsonl")
    assert task.kind == "instruction"
    assert task.label_names == ()
    row = task.splits["train"][0]
    assert row.label is None
    assert (row.text.split()[1], row.target.split()[2]) == (
        row.target.split()[2],
        row.text.split()[1],
    )
    assert task.templates[0].text == "{text}"
    assert task.templates[0].chat


def test_the_seed_decides_the_split(load):
    first, again, other = (load(labelled(), seed=seed) for seed in (0, 0, 1))
    assert first.splits == again.splits
    assert first.splits["test"] != other.splits["test"]


def test_client_and_group_columns_are_read_when_present(load):
    records = [
        row | {"client": i % 3, "group": "old" if i % 5 else "new"}
        for i, row in enumerate(labelled())
    ]
    task = load(records, kind="jsonl")
    assert {row.client for row in task.splits["train"]} == {"0", "1", "2"}
    assert {row.group for row in task.splits["train"]} == {"old", "new"}
    for rows in task.splits.values():
        assert {row.client for row in rows} == {"0", "1", "2"}


def test_columns_may_have_other_names(load):
    records = [
        {"review": row["text"], "stars": int(row["label"] == "a"), "shop": "north", "text": "x"}
        for row in labelled()
    ]
    task = load(
        records, kind="jsonl", text_column="review", label_column="stars", client_column="shop"
    )
    assert task.label_names == ("0", "1")
    assert {row.client for row in task.splits["test"]} == {"north"}


def test_a_split_column_decides(load):
    names = ["train"] * 30 + ["test"] * 20 + ["validation"] * 10
    task = load([row | {"split": name} for row, name in zip(labelled(), names, strict=True)])
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 30,
        "validation": 10,
        "test": 20,
    }


def test_missing_validation_rows_are_taken_from_the_training_rows(load):
    names = ["train"] * 40 + ["test"] * 20
    task = load([row | {"split": name} for row, name in zip(labelled(), names, strict=True)])
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 36,
        "validation": 4,
        "test": 20,
    }


def test_copies_of_a_row_stay_on_one_side(load):
    task = load(labelled(30) * 4)
    contents = [{(row.text, row.target) for row in rows} for rows in task.splits.values()]
    assert sum(map(len, contents)) == 30
    assert len({row.row_id for rows in task.splits.values() for row in rows}) == 120


def test_fixed_labels_keep_their_order_and_may_be_absent(load):
    task = load(labelled(), labels=("b", "c", "a"))
    assert task.label_names == ("b", "c", "a")
    assert {row.label for row in task.splits["train"]} == {0, 2}
    with pytest.raises(
        DataError, match=r"^own\.csv, line 3, column 'label': expected one of a, c, got 'b'"
    ):
        load(labelled(), labels=("a", "c"))
    with pytest.raises(ConfigError, match=r"^task\.labels: expected different names, got a, a$"):
        load(labelled(), labels=("a", "a"))


def test_an_instruction_replaces_the_question(load):
    assert load(labelled(), instruction="Sort it.").templates[0].text == "Sort it.\n\n{text}"
    task = load(prompted(), instruction="Q: {text}\nA:")
    assert [template.text for template in task.templates] == ["Q: {text}\nA:"]


def test_many_labels_are_not_listed_in_the_question(load):
    few = load(labelled()).templates[0].text
    many = load([{"text": f"t{i}", "label": f"label{i % 30}"} for i in range(90)]).templates[0].text
    assert "(a, b)" in few
    assert "label1" not in many


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (
            [{"txt": "a", "label": "b"}],
            {},
            r"line 2: expected either the columns 'prompt' and 'response', or 'text' and 'label', got txt, label$",
        ),
        (
            [{"text": "a", "label": "b", "prompt": "c", "response": "d"}],
            {},
            r"line 2: expected either .* got text, label, prompt, response$",
        ),
        (
            [*labelled(4), {"text": "", "label": "a"}],
            {},
            r"line 6, column 'text': expected text, got an empty value$",
        ),
        (
            [*labelled(4), {"text": "x", "label": " "}],
            {},
            r"line 6, column 'label': expected text, got an empty value$",
        ),
        (
            [{"text": f"{i}", "label": "a"} for i in range(9)],
            {},
            r"line 2, column 'label': expected at least two different labels, got only 'a'$",
        ),
        (
            labelled(),
            {"client_column": "shop"},
            r"line 2, column 'shop': expected a value, got none \(the record's columns: text, label\)$",
        ),
        (
            [row | {"split": "dev"} for row in labelled(9)],
            {},
            r"line 2, column 'split': expected train, validation, test, got 'dev'$",
        ),
        (
            [row | {"split": "train"} for row in labelled(9)],
            {},
            r"column 'split': expected at least one test row in the file, got none$",
        ),
        (labelled(2), {}, r"expected at least 3 different rows .*, got 2$"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(load, records, options, message):
    with pytest.raises(
        DataError, match=rf"^own\.csv[,:] .*{message}|^own\.csv[,:] {message}"
    ) as caught:
        load(records, **options)
    assert "\n" not in str(caught.value)


def test_a_json_record_without_a_value_is_named(load):
    with pytest.raises(
        DataError, match=r"^own\.jsonl, line 5, column 'label': expected a value, got none"
    ):
        load([*labelled(4), {"text": "x"}], kind="jsonl")
    with pytest.raises(
        DataError, match=r"^own\.jsonl, line 5, column 'text': expected text, got int 3$"
    ):
        load([*labelled(4), {"text": 3, "label": "a"}], kind="jsonl")


def test_both_pairs_of_columns_are_resolved_by_an_empty_name(load):
    records = [a | b for a, b in zip(labelled(), prompted(60), strict=True)]
    assert load(records, text_column="").kind == "instruction"
    assert load(records, prompt_column="").kind == "classification"


def test_no_file_is_a_clear_error():
    with pytest.raises(
        ConfigError, match=r"^task csv: expected data_path, the file to read, got none$"
    ):
        load_csv(TaskOptions(name="csv"), 0)
