from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.verification import VerificationConfig


@pytest.mark.parametrize(
    ("option", "value"),
    [("budget", 0), ("retrains", 2), ("shadows", 4), ("shadows", 9), ("shadows", -1), ("margin", 0.0), ("margin", 0.2),
     ("share", -0.1), ("share", 0.6), ("relearn_steps", ()), ("relearn_steps", (5, 1)), ("relearn_steps", (0, 1)),
     ("resamples", 0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"verification.{option}: expected"):
        VerificationConfig(**{option: value})


def test_no_shadow_models_or_pairs_of_them() -> None:
    assert VerificationConfig(shadows=0).shadows == 0
    assert VerificationConfig(shadows=10).shadows == 10
