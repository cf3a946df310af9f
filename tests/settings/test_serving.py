from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.serving import ServingConfig


@pytest.mark.parametrize(
    ("option", "value"),
    [("host", ""), ("port", -1), ("port", 65536), ("max_batch", 0), ("max_queue", 0), ("max_new_tokens", 0),
     ("max_samples", 0), ("max_body_bytes", 0), ("max_wait_seconds", -0.1), ("timeout_seconds", 0.0),
     ("max_context_tokens", 256)],
)  # fmt: skip
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"serving.{option}: expected"):
        ServingConfig(**{option: value})
