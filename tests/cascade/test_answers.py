import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.cascade import Answer, normalised, parsed_label
from fedllm_flwr.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Yes\n", "yes"),
        ("YES", "yes"),
        ("New \t York", "new york"),
        ("ﬁne", "fine"),
        ("Straße", "strasse"),
        ("", None),
        (" \n", None),
        (None, None),
        ("yes.", "yes."),
    ],
)
def test_answers_are_compared_without_case_and_spacing(text: str | None, form: str | None) -> None:
    assert normalised(text) == form


@given(st.text())
def test_a_normal_form_is_its_own(text: str) -> None:
    form = normalised(text)
    if form is not None:
        assert form == " ".join(form.split())
        assert normalised(f" {form}  ") == normalised(form)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Safe", "safe"),
        ("It is not safe.", "not safe"),
        ("The answer: SAFE!", "safe"),
        ("safe, safe and safe", "safe"),
        ("safe or not safe?", None),
        ("unsafe", None),
        ("", None),
        (None, None),
        ("I do not know", None),
    ],
)
def test_a_label_is_what_the_text_states_and_nothing_else(
    text: str | None, label: str | None
) -> None:
    assert parsed_label(text, ("safe", "not safe")) == label


def test_labels_keep_their_spelling_and_may_hold_signs() -> None:
    assert parsed_label("i'd say c++ here", ("C++", "C#")) == "C++"
    assert parsed_label("1", ("1", "10")) == "1"
    assert parsed_label("10", ("1", "10")) == "10"


@pytest.mark.parametrize("labels", [(), ("a", "A "), ("a", " ")])
def test_a_set_that_is_none_is_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="labels: expected a set of different labels, got "):
        parsed_label("a", labels)


@pytest.mark.parametrize(
    ("field", "value"),
    [("input_tokens", -1), ("output_tokens", -1), ("seconds", -0.1), ("seconds", float("nan")),
     ("score", 1.1), ("score", -0.1), ("score", float("nan"))],
)  # fmt: skip
def test_impossible_figures_name_the_answer_and_the_field(field: str, value: float) -> None:
    good = {"input_tokens": 1, "output_tokens": 2, "score": 1.0, "seconds": 0.0}
    assert Answer("q", "t", "m", "a", True, **good).tokens == 3
    with pytest.raises(ConfigError, match=f"answer of t/m to q: expected {field} .*, got "):
        Answer("q", "t", "m", "a", True, **{**good, field: value})
