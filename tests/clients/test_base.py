from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clients.base import Adapted, local_settings, scored
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.training.evaluate import evaluate

Fixture = Callable[..., Any]


def test_settings_of_the_configuration_reach_the_loop(micro: Fixture) -> None:
    config = micro("client.gradient_accumulation=3", "client.clip_norm=0.5", "optimizer=sgd",
                   "optimizer.momentum=0.9", "client.proximal_mu=0.1")  # fmt: skip
    found = local_settings(open_workspace(whole_json(config)), 0.125, "b")
    assert (found.learning_rate, found.side, found.optimizer) == (0.125, "b", "sgd")
    assert (found.gradient_accumulation, found.clip_norm, found.momentum) == (3, 0.5, 0.9)
    assert (found.batch_size, found.local_steps, found.proximal_mu) == (4, 2, 0.1)


def test_scores_of_rows_add_up_to_the_evaluation(micro: Fixture) -> None:
    work = open_workspace(whole_json(micro()))
    losses, tokens, correct = scored(work, 1, "test", Adapted(None, None))
    encoder = work.encoder()
    sums = evaluate(work.backbone, work.encoded(1, "test"), head_token_ids=encoder.head_token_ids,
                    label_token_ids=encoder.label_token_ids)  # fmt: skip
    assert float(np.sum(losses)) == pytest.approx(sums.loss_sum, rel=1e-6)
    assert (int(tokens.sum()), int((correct == 1).sum())) == (sums.label_tokens, sums.correct)


def test_clients_that_cannot_evaluate_are_named_one_by_one(micro: Fixture, play: Fixture) -> None:
    config = micro("method=fedprompt", "num_rounds=1", "runtime.num_nodes=1")
    played = play(config, splits=("test",))
    strategy = played.strategy
    strategy.parts["shared"] = strategy.parts["shared"][:-3]
    strategy.evaluated_splits = ("test",)
    sent = strategy.configure_evaluate(1, strategy.arrays(), None, played.grid)
    found = strategy.aggregate_evaluate(1, played.grid.send_and_receive(sent))
    assert found is None
    failures = [f["reason"] for f in played.run.records("failure")]
    assert len(failures) == 4
    assert all(
        "evaluation failed (ShapeError); the node's log says why" in reason for reason in failures
    )
