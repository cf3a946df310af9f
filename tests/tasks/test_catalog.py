import json
from collections import Counter

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import TASKS, check_options, load_task

REAL = ("r8_topics", "vader_sentiment", "spurious_sentiment", "intents", "headlines", "keyboard")


def test_the_table_is_closed_and_an_unknown_name_lists_it():
    with pytest.raises(ConfigError, match=r"^task\.name: expected one of r8_topics, .* got 'r9'$"):
        load_task(TaskOptions(name="r9"), 0)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("r8_topics", "domains", ("movie",)),
        ("vader_sentiment", "languages", ("en",)),
        ("vader_sentiment", "correlation", 0.5),
        ("spurious_sentiment", "domains", ("movie",)),
        ("intents", "data_path", "x.csv"),
        ("headlines", "instruction", "Sum up."),
        ("csv", "languages", ("en",)),
        ("synthetic", "label_column", "topic"),
    ],
)
def test_an_option_that_the_task_ignores_is_refused(name, option, value):
    with pytest.raises(
        ConfigError, match=rf"^task\.{option}: .* task {name} does not read it, got "
    ):
        check_options(TaskOptions(name=name, **{option: value}))


def test_every_option_that_a_task_reads_may_be_set():
    check_options(TaskOptions(name="vader_sentiment", domains=("movie",)))
    check_options(TaskOptions(name="spurious_sentiment", correlation=0.5))
    check_options(TaskOptions(name="intents", languages=("en",), train_rows=10))
    check_options(TaskOptions(name="jsonl", data_path="x", prompt_column="q", labels=("a", "b")))


def test_a_task_is_loaded_once():
    options = TaskOptions(name="synthetic", train_rows=40)
    assert load_task(options, 0) is load_task(TaskOptions(name="synthetic", train_rows=40), 0)
    assert load_task(options, 0) is not load_task(options, 1)


def test_row_counts_are_kept_and_labels_stay_balanced():
    options = TaskOptions(name="synthetic", train_rows=40, validation_rows=-1, test_rows=20)
    splits = load_task(options, 0).splits
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [40, 0, 20]
    assert set(Counter(row.label for row in splits["train"]).values()) == {10}


@pytest.mark.assets
@pytest.mark.parametrize("name", REAL)
def test_every_real_task_is_sound(name):
    task = load_task(TaskOptions(name=name), 0)
    assert task.name == name
    assert task.kind == TASKS[name].kind
    rows = [row for rows in task.splits.values() for row in rows]
    assert len({row.row_id for row in rows}) == len(rows)
    assert all(task.splits[split] for split in ("train", "validation", "test"))
    assert len(task.label_names) == len(task.label_words) == len(set(task.label_words))
    assert all((row.label is None) == (task.kind == "instruction") for row in rows)
    assert len({template.name for template in task.templates}) == len(task.templates)


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "default", "last"),
    [
        ("r8_topics", "topic", ["expert"]),
        ("vader_sentiment", "sentence", ["expert"]),
        ("spurious_sentiment", "sentence", ["expert", "group_aware"]),
        ("intents", "about", ["expert", "group_aware"]),
    ],
)
def test_hard_prompts_stand_behind_the_default(name, default, last):
    templates = load_task(TaskOptions(name=name), 0).templates
    assert templates[0].name == default
    assert [template.name for template in templates[-len(last) :]] == last
    assert all(template.system for template in templates[-len(last) :])


def test_a_file_decides_its_kind(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [json.dumps({"prompt": f"q{i}", "response": f"a{i}"}) for i in range(20)]
    path.write_text("\n".join(lines))
    task = load_task(TaskOptions(name="jsonl", data_path=str(path), train_rows=5), 0)
    assert TASKS["jsonl"].kind is None
    assert task.kind == "instruction"
    assert len(task.splits["train"]) == 5
