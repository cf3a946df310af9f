from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Adaptation, Generator, Query, Sampling
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.tiers.members import Asking, Reply, chosen_labels
from fedllm_flwr.training.evaluate import evaluate, scores

Fixture = Callable[..., Any]


def test_labels_are_those_of_the_existing_evaluation(task: Task, adapted: Fixture) -> None:
    member = adapted(3)
    rows = task.splits["test"]
    replies = member.ask(task, rows, Asking())
    backbone = member.backbone()
    encoder = build_encoder(task, backbone.tokenizer, loss="labels", max_tokens=48)
    heads = encoder.head_token_ids
    sums = evaluate(backbone, encoder.encode(rows), head_token_ids=heads, delta=member.delta)
    right = sum(reply.text == row.target for row, (reply,) in zip(rows, replies, strict=True))
    assert right == sums.correct
    found = scores(
        backbone,
        encoder.encode(rows),
        label_token_ids=encoder.label_token_ids,
        delta=member.delta,
    )
    assert [r.score for (r,) in replies] == pytest.approx(np.exp(found.max(axis=1)), rel=1e-6)
    assert [r.input_tokens for (r,) in replies] == [len(e.input_ids) for e in encoder.encode(rows)]
    assert {r.output_tokens for (r,) in replies} == {1}


def test_targets_are_not_read(task: Task, adapted: Fixture) -> None:
    rows = task.splits["test"]
    blind = [Row(str(n), row.text, "") for n, row in enumerate(rows)]
    assert adapted(1).ask(task, blind, Asking()) == adapted(1).ask(task, rows, Asking())


def test_samples_read_the_prompt_once_and_depend_on_seed_and_row_only(
    task: Task, adapted: Fixture
) -> None:
    asking = Asking(samples=4, temperature=1.0, seed=7)
    rows = task.splits["test"]
    together = adapted(1).ask(task, rows, asking)
    alone = adapted(1).ask(task, rows[5:6], asking)
    assert [reply.text for reply in alone[0]] == [reply.text for reply in together[5]]
    assert [reply.input_tokens > 0 for reply in together[5]] == [True, False, False, False]
    other = adapted(1).ask(task, rows, replace(asking, seed=8))
    assert [[r.text for r in own] for own in other] != [[r.text for r in own] for own in together]


def test_labels_are_drawn_from_the_probabilities_at_the_temperature() -> None:
    log_probabilities = np.log([0.1, 0.2, 0.3, 0.4])
    asking = Asking(samples=4000, temperature=0.5, seed=1)
    drawn = chosen_labels(log_probabilities, asking, Row("r", "", ""))
    wanted = np.array([0.01, 0.04, 0.09, 0.16]) / 0.3
    assert chisquare(np.bincount(drawn, minlength=4), wanted * 4000).pvalue > 0.001
    assert chosen_labels(log_probabilities, Asking(samples=2), Row("r", "", "")) == [3, 3]


def test_free_text_is_generated_and_its_tokens_are_counted(task: Task, adapted: Fixture) -> None:
    free = replace(task, kind="instruction", label_names=(), label_words=())
    rows = task.splits["test"][:3]
    member = adapted(2)
    replies = member.ask(free, rows, Asking(max_new_tokens=5))
    encoder = build_encoder(task, member.backbone().tokenizer, loss="labels", max_tokens=48)
    prompts = [tuple(e.input_ids.tolist()) for e in encoder.encode(rows)]
    generator = Generator(member.backbone(), Adaptation(delta=member.delta))
    sampling = Sampling(max_new_tokens=5, scored=True)
    answers = generator.generate([Query(p, sampling) for p in prompts])
    for (reply,), own in zip(replies, answers, strict=True):
        (sample,) = own.samples
        assert sample.log_probability is not None
        score = np.exp(sample.log_probability / sample.output_tokens)
        assert reply == Reply(
            sample.text.strip() or None, own.input_tokens, own.output_tokens, pytest.approx(score)
        )


def test_a_template_that_leaves_no_room_for_free_text_is_named(
    task: Task, adapted: Fixture
) -> None:
    free = replace(task, kind="instruction", label_names=(), label_words=())
    short = replace(adapted(1), max_tokens=1)
    with pytest.raises(
        ConfigError, match=r"member m1: expected more than the \d+ tokens .* got max_tokens 1"
    ):
        short.ask(free, task.splits["test"][:1], Asking())


def test_no_queries_need_no_model(task: Task, adapted: Fixture) -> None:
    assert adapted(1).ask(task, [], Asking()) == []
