from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.settings.methods import METHODS, FedPromptConfig


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
