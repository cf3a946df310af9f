"""Let the language model say which attribute a row's text shows, so that groups exist where nobody noted them.

Axes: n rows, a attribute values.

A foundation model that follows a spurious attribute is also good at naming it. So each row's attribute is predicted
zero-shot, (label, predicted attribute) are its group, and a group objective trains on those groups. Prediction runs
where the rows are; neither rows nor predictions leave.

Source:
    Setlur, Garg, Smith, Levine 2024, Prompting is a double-edged sword: improving worst-group robustness of foundation
    models, ICML (Prompting for Robustness, PfR). Differs in the calibration of the answers.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.base import SPLITS, AttributeQuestion, Row, Task, group_name
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.training.evaluate import scores

BLANK_TEXTS = ("N/A", "[MASK]", "")
"""Texts that show no attribute; what the model answers to them is its taste for an answer word."""


def attribute_scores(
    backbone: Backbone, rows: Sequence[Row], question: AttributeQuestion, *, max_tokens: int
) -> np.ndarray:
    """How much more each value fits a row's text than it fits no text at all.

    Args:
        backbone: The shared model, without any adapter or prompt.
        rows: Rows of any task; only their texts are read.
        question: What to ask.
        max_tokens: Longest input; the text is cut, never the question.

    Returns:
        float32 [n, a]: log-probability of each value's answer word, in nats, minus its mean over blank texts.

    Raises:
        ConfigError: The question does not fit into ``max_tokens``, or two answer words begin with the same token.

    Source:
        Zhao et al. 2021, Calibrate before use, section 5 (content-free inputs), as a bias in log-probabilities.
    """
    asking = Task(
        name=f"attribute {question.name}",
        kind="classification",
        splits=dict.fromkeys(SPLITS, ()),
        label_names=question.values,
        label_words=question.words,
        templates=(question.template,),
    )
    encoder = build_encoder(asking, backbone.tokenizer, loss="labels", max_tokens=max_tokens)
    blanks = [Row(f"blank {text}", text, question.words[0], 0) for text in BLANK_TEXTS]
    # Neither the row's own label nor its target may reach the question.
    asked = [replace(row, target=question.words[0], label=0) for row in rows]
    encoded = encoder.encode([*blanks, *asked])
    # The ids are there, because the task has label words.
    found = scores(backbone, encoded, label_token_ids=encoder.label_token_ids or ())
    taste, wanted = found[: len(blanks)], found[len(blanks) :]
    result: np.ndarray = wanted - taste.mean(axis=0)
    return result


def predict_attribute(
    backbone: Backbone, rows: Sequence[Row], question: AttributeQuestion, *, max_tokens: int
) -> list[str]:
    """The best-fitting value for each row; the first of equals.

    Args:
        backbone: As in :func:`attribute_scores`.
        rows: As in :func:`attribute_scores`.
        question: As in :func:`attribute_scores`.
        max_tokens: As in :func:`attribute_scores`.

    Returns:
        One of the question's values for each row, in order.

    Raises:
        ConfigError: As in :func:`attribute_scores`.
    """
    if not rows:
        return []
    best = attribute_scores(backbone, rows, question, max_tokens=max_tokens).argmax(axis=1)
    return [question.values[index] for index in best]


def groups_of(rows: Sequence[Row], attributes: Sequence[str]) -> list[str]:
    """The group (label, attribute) of each row.

    Args:
        rows: Rows with labels.
        attributes: A value for each row, for example from :func:`predict_attribute`.

    Returns:
        Names as those of :func:`fedllm_flwr.tasks.base.group_name`.

    Raises:
        ShapeError: There are not as many values as rows.
    """
    if len(rows) != len(attributes):
        raise ShapeError(
            f"attributes: expected one for each of {len(rows)} rows, got {len(attributes)}"
        )
    return [group_name(row.target, value) for row, value in zip(rows, attributes, strict=True)]
