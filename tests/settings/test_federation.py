from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.federation import BaselinesConfig, FairnessConfig, StrategyConfig


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (StrategyConfig, {"name": "stack", "cohort_fraction": 0.0}, r"cohort_fraction: expected in \(0, 1\]"),
        (StrategyConfig, {"name": "stack", "server_optimizer": "adam"}, r"strategy\.server_optimizer: expected one of"),
        (StrategyConfig, {"name": "stack", "server_momentum": 1.0}, r"strategy\.server_momentum: expected in \[0, 1\)"),
        (BaselinesConfig, {"name": "all", "tuning_rounds": 0}, r"baselines\.tuning_rounds: expected >= 1, got 0"),
        (BaselinesConfig, {"name": "all", "tuning_rows": -1}, r"baselines\.tuning_rows: expected >= 0, got -1"),
        (BaselinesConfig, {"name": "all", "local_tuning_steps": 0}, r"local_tuning_steps: expected >= 1, got 0"),
        (BaselinesConfig, {"name": "all", "learning_rates": (0.0,)}, r"baselines\.learning_rates: expected all > 0"),
        (FairnessConfig, {"name": "group_dro"}, r"fairness=group_dro and fairness\.groups=none"),
        (FairnessConfig, {"name": "bounded_loss", "groups": "data"}, r"fairness\.bound: expected the loss in nats"),
        (FairnessConfig, {"name": "none", "q": -1.0}, r"fairness\.q: expected >= 0, got -1"),
        (FairnessConfig, {"name": "none", "max_gap": 1.0}, r"fairness\.max_gap: expected in \[0, 1\), got 1"),
        (FairnessConfig, {"name": "none", "max_multiplier": 0.0}, r"fairness\.max_multiplier: expected > 0"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(kind: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        kind(**changes)


def test_groups_may_be_measured_without_an_objective_and_q_ffl_needs_none() -> None:
    assert FairnessConfig(name="none", groups="data").groups == "data"
    assert FairnessConfig(name="q_ffl").groups == "none"
