from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.adaptation import ClientConfig, ModelConfig, OptimizerConfig, TaskConfig


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (ModelConfig, {"name": "gpt"}, r"model\.name: expected one of"),
        (ModelConfig, {"name": "tiny", "hub_id": "a/b"}, r"model\.hub_id: belongs to model=hub"),
        (ModelConfig, {"name": "tiny", "quantization": "int3"}, r"model\.quantization: expected one of"),
        (OptimizerConfig, {"name": "sgd", "learning_rate": 0.0}, r"optimizer\.learning_rate: expected > 0, got 0"),
        (OptimizerConfig, {"name": "sgd", "learning_rate": 1.0, "momentum": 1.0}, r"momentum: expected in \[0, 1\)"),
        (ClientConfig, {"batch_size": 0}, r"client\.batch_size: expected >= 1, got 0"),
        (ClientConfig, {"local_steps": 3}, r"expected exactly one above 0, got local_epochs=1 local_steps=3"),
        (TaskConfig, {"name": "synthetic", "max_tokens": 8}, r"task\.max_tokens: expected >= 16, got 8"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(kind: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        kind(**changes)


def test_a_nodes_own_facts_are_given_and_not_configured() -> None:
    ref = ModelConfig(name="path").ref("here")
    assert (ref.path, ModelConfig(name="tiny").ref("here").path) == ("here", "")
    assert ModelConfig(name="tiny", quantization="nf4").ref("").quantization == "nf4"
    assert TaskConfig(name="csv", loss="labels").options("mine.csv").data_path == "mine.csv"
