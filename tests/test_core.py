import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fedllm_flwr import core, records
from fedllm_flwr.averaging import dense, product_of
from fedllm_flwr.config import run_config
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.privacy import sum_epsilon
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.directory import RunDirectory

Fixture = Callable[..., Any]
SUMMARY = {
    "experiment", "method", "num_clients", "num_rounds", "accuracy", "majority_accuracy", "zero_shot_accuracy",
    "worst_client_accuracy", "worst_decile_accuracy", "mean_client_accuracy", "loss",
    "uplink_bytes", "downlink_bytes", "seconds", "adapter_sha256", "fingerprint",
    "resumed_rounds", "dropped_replies", "local_accuracy", "central_accuracy", "bag_of_words_accuracy",
}  # fmt: skip
"""Keys that programs rely on in a run with all baselines."""


class Ran:
    """A run, and the grid that carried it."""

    def __init__(self, grid: Any, config: Any, out_dir: Path) -> None:
        self.grid, self.config, self.out_dir = grid, config, out_dir
        self.summary = core.run(grid, config, out_dir)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory.open(self.out_dir)


@pytest.fixture(scope="module")
def finished(micro: Fixture, edge_grid: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two rounds with every baseline, whole."""
    config = micro("num_rounds=2", "evaluate_every=1", "baselines=all", "strategy=residual")
    return Ran(edge_grid(), config, tmp_path_factory.mktemp("core") / "run")


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file that matters; a lock holds nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_leaves_one_directory_with_everything(finished: Ran) -> None:
    top = {path.name for path in finished.out_dir.iterdir()} - {".lock"}
    assert top == {"manifest.json", "metrics.jsonl", "checkpoints", "adapter", "tensorboard", "report.html",
                   "summary.json"}  # fmt: skip
    names = set(contents(finished.out_dir))
    assert {f"checkpoints/round-000{n}/arrays.safetensors" for n in range(3)} <= names
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert not [name for name in names if "tmp" in name]


def test_the_manifest_brings_the_configuration_back(finished: Ran) -> None:
    manifest = finished.directory.manifest
    assert manifest["fingerprint"] == finished.config.fingerprint()
    assert run_config(manifest["config"]) == finished.config
    assert {"versions", "cpu"} <= set(manifest["environment"])


def test_the_summary_is_flat_and_has_what_programs_read(finished: Ran) -> None:
    summary = finished.directory.summary()
    assert summary == finished.summary
    assert set(summary) >= SUMMARY
    assert summary["resumed_rounds"] == summary["dropped_replies"] == 0
    assert (summary["num_clients"], summary["num_rounds"], summary["selected_round"]) == (4, 2, 2)
    last = finished.directory.records("round")[-1]
    assert all(
        summary[name] == last[name] for name in ("accuracy", "loss", "worst_client_accuracy")
    )


@pytest.mark.parametrize(("kind", "prefix"), [("train", ""), ("evaluate", "evaluate_")])
def test_bytes_in_the_summary_are_those_of_the_serialised_messages(
    kind: str, prefix: str, finished: Ran, wire_bytes: Fixture
) -> None:
    asked = {
        m.metadata.message_id: json.loads(m.content["instruction"]["body"])
        for m in finished.grid.sent
    }
    # Baselines are not part of the method's bytes: zero-shot and the rounds of local-only and centralised come
    # before and after the method's own messages, which alone ask for all clients under the configured rule.
    own = {
        i for i, body in asked.items() if body and body["config"]["strategy"]["name"] == "residual"
    }
    replies = [
        r for r in finished.grid.replies
        if r.metadata.message_type == kind and r.metadata.reply_to_message_id in own
    ]  # fmt: skip
    if (
        kind == "evaluate"
    ):  # zero-shot uses the method's configuration, and asks for one split at a time
        replies = [r for r in replies if len(asked[r.metadata.reply_to_message_id]["splits"]) == 2]
    assert len(replies) == {"train": 4, "evaluate": 6}[kind]
    assert finished.summary[f"{prefix}uplink_bytes"] == sum(len(wire_bytes(r)) for r in replies)
    ledger = [
        b
        for b in finished.directory.records("bytes")
        if b["message"] == kind and b["direction"] == "uplink"
    ]
    assert sum(b["messages"] for b in ledger) == len(replies)


def test_the_hash_is_of_the_final_adapter_and_what_is_carried(finished: Ran) -> None:
    saved = checkpoints.latest(finished.directory.checkpoints)
    assert saved is not None
    arrays = {name: saved.arrays[name] for name in ("adapter", "delta")}
    assert finished.summary["adapter_sha256"] == records.arrays_sha256(arrays)


def test_the_exported_adapter_is_the_whole_update(finished: Ran) -> None:
    _, factors = import_peft(finished.out_dir / "adapter")
    saved = checkpoints.latest(finished.directory.checkpoints)
    assert saved is not None
    shapes = layer_shapes(finished.config.model.ref(""), finished.config.method.target_modules)
    delta = records.unpack_delta(saved.arrays["delta"], saved.state["delta_ranks"], shapes)
    for name, layer in factors.items():
        assert layer.rank == finished.config.method.rank + delta[name].rank
        carried = np.abs(dense(product_of(layer)) - dense(delta[name])).max()
        assert carried > 1e-4, "the adapter beside the carried delta is in it too"


def test_a_finished_run_that_is_run_again_computes_nothing_and_stays_what_it_is(
    finished: Ran, edge_grid: Fixture, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.out_dir, folder)
    before = contents(folder)
    again = Ran(edge_grid(), finished.config, folder)
    assert [m.metadata.message_type for m in again.grid.sent] == ["query.describe"] * 2
    assert again.summary | {"resumed_rounds": 0} == finished.summary
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("tensorboard")} <= {
        "summary.json",
        "report.html",
    }


def test_a_run_without_summary_repeats_nothing_that_is_kept(
    finished: Ran, edge_grid: Fixture, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.out_dir, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "round-0002")
    again = Ran(edge_grid(), finished.config, folder)
    assert again.summary["adapter_sha256"] == finished.summary["adapter_sha256"]
    assert again.summary["resumed_rounds"] == 1
    trained = [m for m in again.grid.sent if m.metadata.message_type == "train"]
    assert len(trained) == 2, "round 2 on two nodes; no baseline"
    names = [b["name"] for b in again.directory.records("baseline")]
    assert sorted(names) == ["bag_of_words", "centralised", "local_only", "majority", "zero_shot"]


def test_a_run_killed_before_its_first_checkpoint_keeps_its_baselines(
    finished: Ran, edge_grid: Fixture, tmp_path: Path
) -> None:
    run = RunDirectory.create(tmp_path / "run", finished.directory.manifest)
    for baseline in finished.directory.records("baseline"):
        run.append(baseline)
    run.append({"kind": "evaluation", "round": 0, "partition_id": 0})
    again = Ran(edge_grid(), finished.config, tmp_path / "run")
    assert again.summary["adapter_sha256"] == finished.summary["adapter_sha256"]
    assert len(again.directory.records("baseline")) == 5
    asked = [json.loads(m.content["instruction"]["body"]) for m in again.grid.sent]
    assert all(len(body["splits"]) == 2 for body in asked if "splits" in body), (
        "no zero-shot, no baseline"
    )


def test_a_directory_of_another_configuration_is_refused_and_left_alone(
    finished: Ran, edge_grid: Fixture
) -> None:
    before = contents(finished.out_dir)
    other = replace(finished.config, seed=1)
    match = f"fingerprint {finished.config.fingerprint()}, .* has {other.fingerprint()}"
    with pytest.raises(ConfigError, match=match):
        core.run(edge_grid(), other, finished.out_dir)
    assert contents(finished.out_dir) == before


def test_another_runtime_may_go_on_with_a_run(
    finished: Ran, edge_grid: Fixture, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.out_dir, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "round-0002")
    runtime = replace(finished.config.runtime, num_nodes=4, clients_per_wave=1)
    again = Ran(edge_grid(4), replace(finished.config, runtime=runtime), folder)
    assert again.summary["adapter_sha256"] == finished.summary["adapter_sha256"]


def test_a_run_that_gives_up_says_why_and_goes_on_later(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("num_rounds=2", "evaluate_every=1")
    whole = Ran(edge_grid(), config, tmp_path / "whole")

    def second_round_fails(asked: list[Message], replies: list[Message]) -> list[Message]:
        if records.read_body(asked[0]).get("server-round") == 2:
            return [Message(Error(5, "node died"), reply_to=m) for m in asked]
        return replies

    with pytest.raises(RunStoppedError, match="round 2: 0 of 4 clients"):
        core.run(edge_grid(2, second_round_fails), config, tmp_path / "run")
    stopped = RunDirectory.open(tmp_path / "run")
    assert not stopped.is_finished
    assert stopped.records("event")[-1]["text"].startswith("stopped: round 2: 0 of 4 clients")
    assert (tmp_path / "run" / "report.html").exists(), "what there is can be looked at"
    again = Ran(edge_grid(), config, tmp_path / "run")
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert again.summary["resumed_rounds"] == 1
    assert again.summary["dropped_replies"] == 0, "the round that failed was forgotten"


def test_a_damaged_checkpoint_is_passed_over(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro("num_rounds=2")
    whole = Ran(edge_grid(), config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    arrays = tmp_path / "run" / "checkpoints" / "round-0002" / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"\x00")
    again = Ran(edge_grid(), config, tmp_path / "run")
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert again.summary["resumed_rounds"] == 1
    notes = [event["text"] for event in again.directory.records("event")]
    assert any("round-0002 is damaged" in text for text in notes)


# A task without labels ----------------------------------------------------------------------------------------------


def test_rows_of_prompts_and_answers_have_bits_per_character(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"What comes after {n}?", "response": f"After {n} comes {n + 1}."}
        for n in range(40)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = micro("task=jsonl", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
                   "task.loss=vocabulary", "partition=iid", "partition.num_clients=2", "num_rounds=1",
                   "baselines=quick", f"runtime.data_path={file}")  # fmt: skip
    ran = Ran(edge_grid(node_config={"data-path": str(file)}), config, tmp_path / "run")
    assert not {"accuracy", "majority_accuracy", "bag_of_words_accuracy"} & set(ran.summary)
    assert ran.summary["loss"] < ran.summary["zero_shot_loss"]
    assert 0 < ran.summary["bits_per_character"] < ran.summary["zero_shot_bits_per_character"]
    assert ran.summary["dropped_replies"] == 0


def test_the_default_directory_names_experiment_and_time(micro: Fixture) -> None:
    found = core.default_out_dir(micro())
    assert re.fullmatch(r"outputs/smoke/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", found)


def test_a_later_command_changes_only_what_it_names(finished: Ran, micro: Fixture) -> None:
    composed = micro("runtime=simulation", "runtime.threads=2").runtime

    def chosen(*overrides: str) -> Any:
        return core.chosen_runtime(finished.directory, composed, overrides)

    started = finished.config.runtime
    assert chosen("seed=4") == started
    assert chosen("runtime.threads=2") == replace(started, threads=2)
    carried = chosen("runtime=simulation", "runtime.threads=2")
    assert carried == replace(composed, dtype=started.dtype, cohort_tokens=started.cohort_tokens)
    assert chosen("runtime=simulation", "++runtime.dtype=float32").dtype == composed.dtype


@pytest.mark.parametrize(("verbose", "level"), [(False, logging.WARNING), (True, logging.INFO)])
def test_flowers_own_log_is_quiet_unless_it_is_asked_for(verbose: bool, level: int) -> None:
    logger = logging.getLogger("flwr")
    before = logger.level
    try:
        logger.setLevel(logging.INFO)
        core.quiet_flower(verbose)
        assert logger.level == level
    finally:
        logger.setLevel(before)


def test_a_run_ends_well_before_it_would_exceed_its_privacy_budget(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    budget = (sum_epsilon(4.0, 2, 1e-5) + sum_epsilon(4.0, 3, 1e-5)) / 2
    config = micro(
        "num_rounds=5", "strategy.weighting=uniform", "privacy=central", "privacy.noise_multiplier=4",
        "privacy.clip_norm=0.1", f"privacy.epsilon_budget={budget}",
    )  # fmt: skip
    ran = Ran(edge_grid(), config, tmp_path / "run")
    expected = {
        "selected_round": 2,
        "stopped_by_budget": True,
        "delta": 1e-5,
        "epsilon": sum_epsilon(4.0, 2, 1e-5),
    }
    assert {key: ran.summary[key] for key in expected} == expected
    assert "accuracy" in ran.summary
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    events = [event["text"] for event in ran.directory.records("event")]
    assert f"round 3 of 5 is not run: it would exceed privacy.epsilon_budget={budget:g}" in events
    assert any(text.startswith("method.sharing=both and privacy=central") for text in events)
    again = Ran(edge_grid(), config, tmp_path / "run")
    assert again.summary | {"resumed_rounds": 0} == ran.summary
    assert [event["text"] for event in again.directory.records("event")] == events


def test_a_run_without_noise_states_no_epsilon(
    micro: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    config = micro(
        "num_rounds=1", "evaluate_every=1", "strategy.weighting=uniform", "privacy=central",
        "privacy.noise_multiplier=0",
    )  # fmt: skip
    summary = Ran(edge_grid(), config, tmp_path / "run").summary
    assert "epsilon" not in RunDirectory.open(tmp_path / "run").summary()
    assert summary["stopped_by_budget"] is False
