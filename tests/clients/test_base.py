from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clients.base import Adapted, local_settings, scored, training_info
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.training.evaluate import evaluate
from fedllm_flwr.training.local import LocalResult
from fedllm_flwr.training.private import Releases
from fedllm_flwr.training.settings import SamplePrivacy

Fixture = Callable[..., Any]


def test_settings_of_the_configuration_reach_the_loop(micro: Fixture) -> None:
    config = micro("client.gradient_accumulation=3", "client.clip_norm=0.5", "optimizer=sgd",
                   "optimizer.momentum=0.9", "client.proximal_mu=0.1")  # fmt: skip
    found = local_settings(open_workspace(whole_json(config)), 0.125, "b")
    assert (found.learning_rate, found.side, found.optimizer) == (0.125, "b", "sgd")
    assert (found.gradient_accumulation, found.clip_norm, found.momentum) == (3, 0.5, 0.9)
    assert (found.batch_size, found.local_steps, found.proximal_mu) == (4, 2, 0.1)


def test_rows_privacy_reaches_the_loop_and_no_other_does(micro: Fixture) -> None:
    rows = micro(
        "client.clip_norm=0",
        "privacy=sample",
        "privacy.clip_norm=0.5",
        "privacy.noise_multiplier=3",
    )
    found = local_settings(open_workspace(whole_json(rows)), 0.1)
    assert found.sample_privacy == SamplePrivacy(clip_norm=0.5, noise_multiplier=3.0)
    local = local_settings(open_workspace(whole_json(micro("privacy=local"))), 0.1)
    assert local.sample_privacy is None


def test_a_client_with_private_rows_tells_nothing_that_is_computed_from_them() -> None:
    result = LocalResult(
        partition_id=3,
        adapter=np.zeros(2, np.float32),
        first_loss=2.0,
        loss=1.0,
        num_examples=7,
        steps=4,
        tokens=90,
        cpu_seconds=0.5,
        releases=Releases(sampling_rate=0.5, steps=4, noise_multiplier=1.0),
    )
    told = {"partition-id": 3, "num-examples": 7, "steps": 4, "withheld": True, "error": ""}
    assert training_info(result) == told


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
