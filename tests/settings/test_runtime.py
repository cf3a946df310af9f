from dataclasses import fields
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.runtime import NODE_LOCAL_FIELDS, RuntimeConfig


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"workers": 0}, r"runtime\.workers: expected >= 1, got 0"),
        ({"cohort_tokens": -1}, r"runtime\.cohort_tokens: expected >= 0 \(0 = serial\), got -1"),
        ({"state_cache_mib": -1}, r"runtime\.state_cache_mib: expected >= 0 \(0 = off\), got -1"),
        ({"gpus_per_worker": -0.5}, r"runtime\.gpus_per_worker: expected >= 0"),
        ({"node_wait_seconds": 0.0}, r"runtime\.node_wait_seconds: expected > 0"),
        ({"max_message_mb": 0.0}, r"runtime\.max_message_mb: expected > 0, got 0\.0"),
    ],
)
def test_what_is_out_of_range_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RuntimeConfig(name="loopback", **changes)


def test_node_local_fields_are_fields() -> None:
    assert set(NODE_LOCAL_FIELDS) <= {field.name for field in fields(RuntimeConfig)}
