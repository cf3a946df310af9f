import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_flwr.exporting import CONTROLLER_FILE, export
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.models.tiny import tiny_model, tiny_tokenizer
from fedllm_flwr.reservoir import Reservoir, ReservoirSpec
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.encode import build_encoder

Fixture = Callable[..., Any]


@pytest.fixture
def exported(micro: Fixture, play: Fixture, tmp_path: Path) -> Callable[..., Any]:
    def run(*overrides: str) -> Any:
        played = play(micro("method=fedprompt", "num_rounds=1", *overrides))
        export(played.strategy.config, played.strategy, tmp_path / "adapter")
        return played.strategy

    return run


def test_a_prompt_behind_the_fixed_text_knows_that_text(exported: Fixture, tmp_path: Path) -> None:
    strategy = exported()
    found = import_prompt(tmp_path / "adapter")
    np.testing.assert_array_equal(found.flat, strategy.parts["shared"])
    config = strategy.config
    encoder = build_encoder(load_task(config.task.options(""), config.seed), tiny_tokenizer(), template="read",
                            loss=config.task.loss, max_tokens=config.task.max_tokens)  # fmt: skip
    assert len(encoder.fixed_ids) >= 5, "there is a text that could be forgotten"
    assert tuple(found.fixed_ids) == tuple(encoder.fixed_ids)


def test_a_personal_prompt_is_not_exported(exported: Fixture, tmp_path: Path) -> None:
    strategy = exported("method.personal_length=2")
    found = import_prompt(tmp_path / "adapter")
    assert [segment.name for segment in found.spec.segments] == ["shared"]
    np.testing.assert_array_equal(found.flat, strategy.parts["shared"])


def test_every_cluster_has_a_folder_with_its_prompt_before_the_shared_one(
    exported: Fixture, tmp_path: Path
) -> None:
    strategy = exported("method.cluster_length=2")
    strategy.parts["cluster/../../evil"] = strategy.parts[
        next(n for n in strategy.parts if "/" in n)
    ]
    export(strategy.config, strategy, tmp_path / "again")
    folders = sorted(p.name for p in (tmp_path / "again" / "clusters").iterdir())
    assert folders[0] == "%2e%2e%2f%2e%2e%2fevil", "a client chose this name"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "again"]
    for name in folders[1:]:
        found = import_prompt(tmp_path / "again" / "clusters" / name)
        both = np.concatenate([strategy.parts[f"cluster/{name}"], strategy.parts["shared"]])
        np.testing.assert_array_equal(found.flat, both)


@pytest.mark.parametrize("mode", ["fedavg_controller", "private_controller"])
def test_a_controller_is_exported_with_all_that_rebuilds_its_reservoir(
    mode: str, micro: Fixture, play: Fixture, tmp_path: Path
) -> None:
    played = play(micro("method=fedresprompt", f"method.mode={mode}", "num_rounds=1"))
    strategy = played.strategy
    export(strategy.config, strategy, tmp_path / "adapter")
    arrays = load_file(tmp_path / "adapter" / CONTROLLER_FILE)
    shapes = {name: values.shape for name, values in arrays.items()}
    lift = {} if mode == "private_controller" else {"P": (2 * 64, 4)}
    assert shapes == {"W_out": (4, 27)} | lift
    together = np.concatenate([arrays[name].ravel() for name in ("W_out", *lift)])
    np.testing.assert_array_equal(together, strategy.controller)
    described = json.loads((tmp_path / "adapter" / "controller.json").read_text())
    rebuilt = Reservoir(ReservoirSpec(**described["reservoir"]))
    assert rebuilt.fingerprint() == described["reservoir_fingerprint"] == strategy.reservoir


@pytest.mark.parametrize("trainer", ["grass", "dense"])
def test_a_whole_model_is_exported_as_transformers_loads_it(
    trainer: str, micro: Fixture, play: Fixture, tmp_path: Path
) -> None:
    rank = [] if trainer == "grass" else ["method.rank=8"]
    played = play(micro("method=fedgrass", f"method.trainer={trainer}", "num_rounds=1", *rank))
    export(played.strategy.config, played.strategy, tmp_path / "adapter")
    plain = tiny_model().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").state_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")("a b").input_ids
    assert set(found) == set(plain)
    changed = played.strategy.changed
    for name, weight in found.items():
        difference = (weight - plain[name]).numpy()
        update = changed.get(name.removesuffix(".weight"))
        expected = np.zeros_like(difference)
        if update is not None:
            expected[update.indices] = update.values
        np.testing.assert_allclose(difference, expected, rtol=0, atol=1e-6)
