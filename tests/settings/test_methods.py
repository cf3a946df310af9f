from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.settings.methods import METHODS, FedPromptConfig, FedResPromptConfig


def config(**changes: Any) -> FedPromptConfig:
    return FedPromptConfig(name="fedprompt", **changes)


def test_the_prompt_is_personal_then_cluster_then_shared() -> None:
    found = config(length=3, personal_length=2, cluster_length=1).spec()
    assert [(s.name, s.length) for s in found.segments] == [
        ("personal", 2),
        ("cluster", 1),
        ("shared", 3),
    ]
    assert [s.name for s in config().spec().segments] == ["shared"]


def test_parts_and_flat_are_inverse() -> None:
    method = config(length=2, personal_length=1)
    flat = np.arange(12, dtype=np.float32)
    parts = method.split(flat)
    assert {name: part.size for name, part in parts.items()} == {"personal": 4, "shared": 8}
    np.testing.assert_array_equal(method.join(parts), flat)
    peft = config(kind="p_tuning", placement="before", start="random")
    assert peft.split(flat)["shared"] is flat
    assert peft.join({"shared": flat}) is flat
    assert peft.adapter_spec() == PeftPromptSpec("p_tuning", 10)


PEFT = {"kind": "p_tuning", "placement": "before", "start": "random"}
BAD = [
    ({"length": 0}, r"method\.length: expected >= 1, got 0"),
    ({"personal_length": -1}, r"method\.personal_length: expected >= 0, got -1"),
    ({"start": "text"}, r"method\.start_text: belongs to method\.start=text and is needed there"),
    ({"start": "text", "start_text": "hi", "common_start": False}, r"common_start=false and method\.start=text"),
    ({"start_text": "hello"}, r"method\.start_text: belongs to method\.start=text"),
    ({"local_training": "alternating"}, r"local_training=alternating and method\.personal_length=0"),
    ({"encoder_hidden_size": 8}, r"method\.encoder_hidden_size=8 and method\.kind=soft"),
    ({**PEFT, "placement": "after"}, r"method\.placement=after and method\.kind=p_tuning"),
    ({**PEFT, "start": "vocabulary"}, r"method\.start=vocabulary and method\.kind=p_tuning"),
    ({**PEFT, "personal_length": 2}, r"method\.personal_length=2 and method\.kind=p_tuning"),
    ({**PEFT, "trainer": "black_box"}, r"method\.trainer=black_box and method\.kind=p_tuning"),
    ({"search_dimension": 1}, r"method\.search_dimension: expected >= 2, got 1"),
    ({"search_population": 3}, r"method\.search_population: expected >= 4, got 3"),
    ({"search_sigma": 0.0}, r"method\.search_sigma: expected > 0, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), BAD)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(**changes)


def test_the_table_has_every_method_under_its_own_name() -> None:
    for name, kind in METHODS.items():
        assert kind(name=name).name == name


RESERVOIR_BAD = [
    ({"length": 0}, r"method\.length: expected >= 1, got 0"),
    ({"controller_size": 0}, r"method\.controller_size: expected >= 1, got 0"),
    ({"micro_steps": 0}, r"method\.micro_steps: expected >= 1, got 0"),
    ({"clip_norm": -1.0}, r"method\.clip_norm: expected >= 0, got -1"),
    ({"noise_multiplier": 1.0}, r"method\.noise_multiplier=1 and method\.clip_norm=0"),
    ({"micro_steps": 2, "mode": "sync_sgd"}, r"method\.micro_steps=2 and method\.mode=sync_sgd"),
    ({"server_text": "prompt_after", "server_model": "surrogate"}, r"server_text=prompt_after and method"),
    ({"leak": 0.0}, r"reservoir leak: expected in \(0, 1\], got 0"),
    ({"reservoir_size": 1}, r"reservoir size: expected 2 to"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), RESERVOIR_BAD)
def test_what_does_not_fit_a_reservoir_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        FedResPromptConfig(name="fedresprompt", **changes)


def test_a_reservoir_follows_the_run_and_the_width_of_a_series() -> None:
    method = FedResPromptConfig(name="fedresprompt", reservoir_size=30, input_size=5, length=2)
    assert method.reservoir(0, 0) == method.reservoir(0, 0)
    assert method.reservoir(0, 0).seed != method.reservoir(1, 0).seed
    assert [method.reservoir(0, width).input_size for width in (0, 3)] == [5, 3]
    spec = method.controller(3, 64)
    assert (spec.readout_size, spec.bottleneck, spec.prompt_length, spec.width) == (34, 16, 2, 64)
