from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.robust import RobustConfig

UNIFORM = "strategy.weighting=uniform"
TEN = "partition.num_clients=10"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"norm_bound": 0.0}, r"robust\.norm_bound: expected > 0, got 0"),
        ({"trimmed_fraction": 0.5}, r"robust\.trimmed_fraction: expected in \[0, 0\.5\), got 0\.5"),
        ({"num_attackers": -1}, r"robust\.num_attackers: expected >= 0, got -1"),
        ({"num_chosen": -1}, r"robust\.num_chosen: expected >= 0, got -1"),
    ],
)
def test_ranges(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RobustConfig(name="krum", **settings)


def test_how_many_krum_keeps() -> None:
    assert RobustConfig(name="krum", num_attackers=2, num_chosen=4).chosen_of(9) == 1
    assert RobustConfig(name="multi_krum", num_attackers=2).chosen_of(9) == 7
    assert RobustConfig(name="multi_krum", num_attackers=2, num_chosen=4).chosen_of(9) == 4


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("robust=median",), "strategy.weighting=examples: a liar could claim any weight"),
        (("robust=median", UNIFORM, "strategy=stack"), "robust=median and strategy=stack: expected"),
        (("robust=median", UNIFORM, "privacy=central"), "robust=median and privacy=central"),
        (("robust=median", UNIFORM, "method.client_ranks=[2,4]"), "method.client_ranks"),
        (
            ("robust=median", UNIFORM, "method=fedprompt", "strategy=prompt_mean", "method.common_start=false"),
            "method.common_start=true",
        ),
        (
            ("robust=median", UNIFORM, "method=fedresprompt", "strategy=controller_mean", "baselines=none"),
            "strategy=controller_mean: expected a mean",
        ),
        (("robust=krum", UNIFORM, "partition.num_clients=8"), "rounds with at least 5 answers, got 4"),
        (
            ("robust=multi_krum", UNIFORM, TEN, "robust.num_chosen=5"),
            r"robust\.num_chosen: expected at most 4, .* got 5",
        ),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_named(
    overrides: tuple[str, ...], match: str, smoke: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=match):
        smoke(*overrides)


def test_none_goes_with_everything(smoke: Callable[..., Any]) -> None:
    assert smoke("strategy=stack").robust.name == "none"
    assert smoke("robust=krum", UNIFORM, TEN).robust.chosen_of(10) == 1
