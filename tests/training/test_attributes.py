"""Zero-shot attribute prediction against a naive loop through full logits, and on the default model."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.tasks import spurious
from fedllm_flwr.tasks.base import AttributeQuestion, Row, TaskOptions, Template
from fedllm_flwr.tasks.prompts import Prompt
from fedllm_flwr.tasks.sampling import shuffled
from fedllm_flwr.training.attributes import (
    BLANK_TEXTS,
    attribute_scores,
    groups_of,
    predict_attribute,
)

QUESTION = AttributeQuestion(
    "place", ("sea", "hills"), ("wave", "rock"), Template("q", "Note: {text}\nPlace: the")
)
ROWS = [
    Row("r1", "sand and salt", "bad", 0),
    Row("r2", "a long path up through the snow and the stones", "good", 1),
    Row("r3", "x", "good", 1, group="good/hills", client="c"),
]


def naive(backbone: Backbone, text: str) -> np.ndarray:
    prompt = Prompt(QUESTION.template, backbone.tokenizer)
    ids = [*prompt.before, *prompt.text_tokens([text])[0], *prompt.after]
    words = [prompt.answer_tokens(word)[0] for word in QUESTION.words]
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]
    found: np.ndarray = log_softmax(logits[words].double(), dim=0).numpy()
    return found


def test_scores_are_log_probabilities_over_those_of_blank_texts(backbone: Backbone) -> None:
    found = attribute_scores(backbone, ROWS, QUESTION, max_tokens=128)
    taste = np.mean([naive(backbone, text) for text in BLANK_TEXTS], axis=0)
    wanted = np.array([naive(backbone, row.text) - taste for row in ROWS])
    assert found.shape == (3, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    best = [QUESTION.values[index] for index in wanted.argmax(axis=1)]
    assert predict_attribute(backbone, ROWS, QUESTION, max_tokens=128) == best


def test_blank_texts_favour_no_value(backbone: Backbone) -> None:
    blanks = [Row(f"b{i}", text, "bad", 0) for i, text in enumerate(BLANK_TEXTS)]
    found = attribute_scores(backbone, blanks, QUESTION, max_tokens=128)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)


def test_nothing_but_the_text_reaches_the_question(backbone: Backbone) -> None:
    first = attribute_scores(backbone, ROWS, QUESTION, max_tokens=128)
    others = [Row(row.row_id, row.text, "other", None, "g") for row in ROWS]
    again = attribute_scores(backbone, others[::-1], QUESTION, max_tokens=128)
    np.testing.assert_allclose(again[::-1], first, atol=1e-5)


def test_no_rows_ask_nothing(backbone: Backbone) -> None:
    assert predict_attribute(backbone, [], QUESTION, max_tokens=1) == []


def test_questions_that_cannot_be_asked_are_refused(backbone: Backbone) -> None:
    with pytest.raises(
        ConfigError, match="template q of task attribute place takes without a text"
    ):
        predict_attribute(backbone, ROWS, QUESTION, max_tokens=4)
    same = AttributeQuestion("place", ("sea", "hills"), ("stone", "story"), QUESTION.template)
    with pytest.raises(
        ConfigError, match=r"^task attribute place: labels 'stone' and 'story' begin"
    ):
        predict_attribute(backbone, ROWS, same, max_tokens=128)


def test_a_group_is_a_target_and_an_attribute() -> None:
    assert groups_of(ROWS, ["sea", "sea", "hills"]) == ["bad/sea", "good/sea", "good/hills"]
    with pytest.raises(ShapeError, match=r"^attributes: expected one for each of 3 rows, got 1$"):
        groups_of(ROWS, ["sea"])


@pytest.mark.assets
@pytest.mark.slow
def test_the_default_model_reads_the_injected_place() -> None:
    task = spurious.load(TaskOptions(name="spurious_sentiment"), 0)
    rows = shuffled(task.splits["test"], 0, "attribute test")[:100]
    model = load(ModelRef(name="smollm2_135m"), dtype="auto", device="cpu")
    assert task.attribute is not None
    found = groups_of(rows, predict_attribute(model, rows, task.attribute, max_tokens=128))
    right = sum(group == row.group for group, row in zip(found, rows, strict=True))
    assert right >= 85
