import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import records
from strategies.baselines import (
    Recorder,
    centralised,
    figures,
    local_only,
    score,
    unfederated,
    zero_shot,
)
from strategies.hosting import Hosting

Fixture = Callable[..., Any]
SUMS = {"loss_sum": 2.0, "label_tokens": 4, "characters": 8}


def sums(split: str, correct: int, total: int, server_round: int = 1) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "split": split,
        "correct": correct,
        "total": total,
        "round": server_round,
    } | SUMS


def test_figures_pool_one_split_and_name_the_worst_client() -> None:
    found = figures([sums("test", 1, 4), sums("test", 4, 4), sums("validation", 0, 9), sums("test", 0, 0)],
                    "test", "classification")  # fmt: skip
    assert found == {
        "accuracy": 5 / 8, "loss": 0.5, "worst_client_accuracy": 0.25, "worst_decile_accuracy": 0.25,
        "mean_client_accuracy": 0.625,
    }  # fmt: skip


def test_multipliers_are_no_evaluations() -> None:
    line = {"kind": "multiplier", "round": 1, "group": "a", "multiplier": 0.5}
    assert figures([line, sums("test", 3, 4)], "test", "classification")["accuracy"] == 0.75


def test_training_alone_does_the_work_of_both_passes(micro: Fixture) -> None:
    prompts = ("method=fedprompt", "method.personal_length=2")
    both = unfederated(micro(*prompts, "method.local_training=alternating"), 0.1, 1)
    assert (both.client.local_steps, both.method.length, both.method.personal_length) == (4, 5, 0)
    assert unfederated(micro(*prompts), 0.1, 1).client.local_steps == 2


def test_figures_without_labels_have_no_accuracy() -> None:
    found = figures([sums("test", 0, 4)], "test", "instruction")
    assert set(found) == {"loss", "bits_per_character"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [({"accuracy": 0.5, "loss": 9.0}, 0.5), ({"loss": 2.0}, -2.0), ({}, -math.inf)],
)
def test_a_higher_score_is_better(found: dict[str, float], expected: float) -> None:
    assert score(found) == expected


def test_a_recorder_keeps_the_evaluations_of_the_latest_round() -> None:
    notes: list[str] = []
    recorder = Recorder(notes.append)
    for record in (sums("test", 1, 2, 1), sums("test", 2, 2, 2), sums("validation", 2, 2, 2)):
        recorder.evaluated(record)
    assert [(e["round"], e["split"]) for e in recorder.evaluations] == [
        (2, "test"),
        (2, "validation"),
    ]
    recorder.failure(2, 7, "broken")
    assert notes == ["baseline, round 2: client 7 is left out: broken"]


def test_what_is_not_shared_takes_no_part_in_an_unfederated_run(micro: Fixture) -> None:
    config = micro("strategy=svd", "strategy.cohort_fraction=0.5", "wire=float16")
    alone = unfederated(config, 0.125, 2)
    assert (alone.strategy.name, alone.strategy.server_optimizer) == ("factor_mean", "fedavg")
    assert alone.strategy.cohort_fraction == 1.0
    assert (alone.wire.uplink, alone.wire.downlink) == ("float32", "float32")
    assert alone.optimizer.learning_rate == 0.125
    assert (alone.num_rounds, alone.evaluate_every) == (2, 2)
    same = ("client", "task", "partition", "model", "seed")
    assert all(getattr(alone, name) == getattr(config, name) for name in same)


def test_a_robust_mean_of_many_is_no_mean_of_one(micro: Fixture, run: Fixture) -> None:
    config = micro(
        "strategy.weighting=uniform", "robust=norm_bound", "robust.norm_bound=1e-6", "num_rounds=1",
        "evaluate_every=1",
    )  # fmt: skip
    free = micro("strategy.weighting=uniform", "num_rounds=1", "evaluate_every=1")
    assert unfederated(config, 0.02, 1).robust.name == "none"
    bound, plain = (run(local_only, unfederated(c, 0.02, 1))[0] for c in (config, free))
    assert bound == plain, "what a client learns alone is bounded by nobody"


def test_pooled_rows_train_the_servers_adapter_and_not_that_of_the_first_client(
    micro: Fixture, run: Fixture
) -> None:
    config = micro("method.client_ranks=[1,4]", "method.client_alphas=[1.0,8.0]", "num_rounds=1")
    _, grid = run(centralised, unfederated(config, 0.02, 1))
    [reply] = [r for r in grid.replies if r.metadata.message_type == "train"]
    flat = records.read(reply, records.ANSWER)[1][f"{records.POOLED}/adapter"]
    whole = micro("method.rank=4", "num_rounds=1")
    _, other = run(centralised, unfederated(whole, 0.02, 1))
    [expected] = [r for r in other.replies if r.metadata.message_type == "train"]
    np.testing.assert_array_equal(
        flat, records.read(expected, records.ANSWER)[1][f"{records.POOLED}/adapter"]
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.server_optimizer=fedadam", "strategy.server_learning_rate=0.5"),
        ("strategy.server_optimizer=diloco", "strategy.server_momentum=0.5"),
        ("method.sharing=b_only",),
        ("strategy=stack",),
    ],
)
def test_every_configuration_has_an_unfederated_twin(
    overrides: tuple[str, ...], micro: Fixture
) -> None:
    alone = unfederated(micro(*overrides), 0.01, 1)
    assert alone.method.sharing == "both"
    assert alone.fingerprint() != micro(*overrides).fingerprint()


@pytest.fixture
def run(edge_grid: Fixture) -> Callable[..., Any]:
    """Run a baseline function; returns its evaluations and the grid."""

    def ran(
        function: Callable[..., None], config: Any, splits: tuple[str, ...] = ("test",)
    ) -> tuple[Any, Any]:
        grid, recorder = edge_grid(2), Recorder(print)
        hosting = Hosting(grid, 1.0, print, recorder.count)
        hosting.refresh()
        function(config, hosting, recorder, "classification", splits)
        return recorder.evaluations, grid

    return ran


def asked(grid: Any, kind: str) -> list[list[int]]:
    bodies = [records.read_body(m) for m in grid.sent if m.metadata.message_type == kind]
    return [body["partition-ids"] for body in bodies]


def test_alone_a_single_client_is_the_same_as_federated(
    micro: Fixture, run: Fixture, play: Fixture
) -> None:
    config = micro("partition.num_clients=1", "num_rounds=2", "evaluate_every=2")
    evaluations, _ = run(local_only, config)
    federated = play(config, splits=("test",)).run.records("evaluation")
    assert evaluations == [record for record in federated if record["round"] == 2]


def test_local_only_trains_and_evaluates_every_client_for_itself(
    micro: Fixture, run: Fixture
) -> None:
    config = unfederated(micro(), 0.02, 2)
    evaluations, grid = run(local_only, config)
    assert sorted(asked(grid, "train")) == sorted([[p] for p in range(4)] * 2)
    assert asked(grid, "evaluate") == [[p] for p in range(4)]
    assert [(e["partition_id"], e["split"]) for e in evaluations] == [(p, "test") for p in range(4)]
    sent = [m for m in grid.sent if m.metadata.message_type == "evaluate"]
    flats = {records.read(m, records.INSTRUCTION)[1]["adapter"].tobytes() for m in sent}
    assert len(flats) == 4, "each client is evaluated with its own adapter"


def test_centralised_trains_on_all_rows_and_evaluates_each_clients(
    micro: Fixture, run: Fixture
) -> None:
    config = unfederated(micro(), 0.02, 2)
    evaluations, grid = run(centralised, config, ("validation", "test"))
    assert asked(grid, "train") == [[records.POOLED]] * 2
    assert sorted(e["partition_id"] for e in evaluations if e["split"] == "test") == [0, 1, 2, 3]
    trained = [r for r in grid.replies if r.metadata.message_type == "train"]
    infos = [records.read(r, records.ANSWER)[0]["clients"][0] for r in trained]
    assert {info["num-examples"] for info in infos} == {36}
    assert {info["steps"] for info in infos} == {2}


def test_zero_shot_tests_the_template_that_is_best_on_validation_rows(
    micro: Fixture, run: Fixture
) -> None:
    config = micro("task.validation_rows=40", "task.test_rows=40")
    scores, tested, found = {}, {}, {}

    def chosen(
        config: Any,
        hosting: Any,
        recorder: Any,
        kind: str,
        splits: Any,
        names: Any = ("topic", "about"),
    ) -> None:
        found[names] = zero_shot(config, hosting, recorder, kind, names)

    for name in ("topic", "about"):
        run(lambda *args, name=name: chosen(*args, names=(name,)), config)
        tested[name] = found[(name,)]["accuracy"]
    _, grid = run(chosen, config)
    best = found["topic", "about"]
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        if message.metadata.message_type == "evaluate":
            body = records.read_body(message)
            infos = records.read(reply, records.ANSWER)[0]["clients"]
            for info in infos:
                for split, own in info["splits"].items():
                    key = body["template"], split
                    scores[key] = scores.get(key, 0) + own["correct"]
    assert set(scores) == {
        ("topic", "validation"),
        ("about", "validation"),
        (best["detail"].split()[1].rstrip(","), "test"),
    }
    winner = max(("topic", "about"), key=lambda name: scores[name, "validation"])
    assert best["detail"] == f"template {winner}, the best of 2 on validation rows"
    assert best["accuracy"] == tested[winner]
    assert not asked(grid, "train")


@pytest.mark.parametrize(
    ("names", "detail"),
    [
        (("topic", "about"), "template topic, the first of 2: no validation rows to choose on"),
        (("about",), "template about, the only one"),
        (("",), "template by default, the only one"),
    ],
)
def test_zero_shot_claims_no_choice_that_it_did_not_make(
    names: tuple[str, ...], detail: str, micro: Fixture, run: Fixture
) -> None:
    config = micro("task.validation_rows=-1" if len(names) > 1 else "task.validation_rows=12")
    found: dict[str, Any] = {}

    def chosen(config: Any, hosting: Any, recorder: Any, kind: str, splits: Any) -> None:
        found.update(zero_shot(config, hosting, recorder, kind, names))

    _, grid = run(chosen, config)
    assert found["detail"] == detail
    assert 0 <= found["accuracy"] <= 1
    asked_splits = [
        records.read_body(m)["splits"] for m in grid.sent if m.metadata.message_type == "evaluate"
    ]
    assert (["validation"] in asked_splits) == (len(names) > 1)


def test_a_baseline_goes_on_without_a_client_that_fails(micro: Fixture, edge_grid: Fixture) -> None:
    def second_node_is_silent(asked: Any, replies: Any) -> Any:
        both = zip(asked, replies, strict=True)
        return [
            r
            for m, r in both
            if m.metadata.message_type != "train" or m.metadata.dst_node_id != 1001
        ]

    notes: list[str] = []
    grid, recorder = edge_grid(2, second_node_is_silent), Recorder(notes.append)
    hosting = Hosting(grid, 1.0, print, recorder.count)
    hosting.refresh()
    config = replace(unfederated(micro(), 0.02, 1))
    local_only(config, hosting, recorder, "classification", ("test",))
    assert [e["partition_id"] for e in recorder.evaluations] == [0, 1, 2, 3]
    assert [note.split(":")[1] for note in notes] == [
        " client 1 is left out",
        " client 3 is left out",
    ]
