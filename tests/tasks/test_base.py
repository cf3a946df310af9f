import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import (
    AttributeQuestion,
    Row,
    Task,
    TaskOptions,
    Template,
    group_name,
)


def make_task(**changes):
    row = Row("r", "text", "a", 0)
    values = {
        "name": "toy",
        "kind": "classification",
        "splits": {"train": (row,), "validation": (), "test": ()},
        "label_names": ("a", "b"),
        "label_words": ("a", "b"),
        "templates": (Template("first", "{text}"), Template("second", "{text}?")),
    }
    return Task(**(values | changes))


@pytest.mark.parametrize("text", ["no place", "{text} and {text}"])
def test_a_template_has_one_place_for_the_text(text):
    with pytest.raises(
        ConfigError, match=r"^template t: expected \{text\} once, found it [02] times"
    ):
        Template("t", text)


def test_the_empty_template_name_is_the_default():
    task = make_task()
    assert task.template("") is task.templates[0]
    assert task.template("second") is task.templates[1]


def test_an_unknown_template_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^task toy: unknown template 'x', expected one of first, "
    ):
        make_task().template("x")


def test_tasks_are_told_apart_by_identity():
    assert make_task() != make_task()
    assert len({make_task(), make_task()}) == 2


def test_lists_in_options_become_hashable():
    options = TaskOptions(name="intents", languages=["en", "de"], domains=["movie"], labels=["a"])
    assert options == TaskOptions(
        name="intents", languages=("en", "de"), domains=("movie",), labels=("a",)
    )
    assert len({options}) == 1


@pytest.mark.parametrize(
    ("field", "least"), [("train_rows", 0), ("validation_rows", -1), ("test_rows", 0)]
)
def test_row_counts_have_a_least_value(field, least):
    TaskOptions(name="x", **{field: least})
    with pytest.raises(
        ConfigError, match=rf"^task\.{field}: expected >= {least}, got {least - 1}$"
    ):
        TaskOptions(name="x", **{field: least - 1})


@pytest.mark.parametrize("correlation", [0.4, 1.0, float("nan")])
def test_a_correlation_leaves_no_group_empty(correlation):
    TaskOptions(name="x", correlation=0.5)
    with pytest.raises(ConfigError, match=r"^task\.correlation: expected in \[0\.5, 1\), got "):
        TaskOptions(name="x", correlation=correlation)


@pytest.mark.parametrize(
    ("values", "words"),
    [(("a",), ("x",)), (("a", "b"), ("x",)), (("a", "a"), ("x", "y")), (("a", "b"), ("x", "x"))],
)
def test_an_attribute_has_a_word_for_each_of_two_or_more_values(values, words):
    AttributeQuestion("place", ("a", "b"), ("x", "y"), Template("q", "{text}?"))
    with pytest.raises(
        ConfigError, match=r"^attribute place: expected two or more different values"
    ):
        AttributeQuestion("place", values, words, Template("q", "{text}?"))


def test_tasks_have_no_attribute_unless_they_say_so():
    assert make_task().attribute is None
    assert group_name("good", "coast") == "good/coast"
