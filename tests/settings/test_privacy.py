from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import noise_beside_count
from fedllm_flwr.settings.privacy import (
    PRIVACY,
    CentralPrivacy,
    LocalPrivacy,
    NoPrivacy,
    SamplePrivacy,
)


@pytest.mark.parametrize("name", ["central", "local"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clip_norm": 0.0}, r"privacy\.clip_norm: expected > 0, got 0"),
        ({"clip_norm": -1.0}, r"privacy\.clip_norm: expected > 0, got -1"),
        ({"noise_multiplier": -0.5}, r"privacy\.noise_multiplier: expected >= 0 clip norms, got -0\.5"),
        ({"delta": 0.0}, r"privacy\.delta: expected in \(0, 1\), got 0"),
        ({"delta": 1.0}, r"privacy\.delta: expected in \(0, 1\), got 1"),
        ({"epsilon_budget": -1.0}, r"privacy\.epsilon_budget: expected >= 0 \(0 = no budget\), got -1"),
        ({"epsilon_budget": 2.0, "noise_multiplier": 0.0}, r"epsilon_budget=2 and privacy\.noise_multiplier=0"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(name: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PRIVACY[name](name=name, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clip_quantile": 1.0}, r"privacy\.clip_quantile: expected in \(0, 1\), or 0 for a fixed clip norm, got 1"),
        ({"clip_quantile": -0.5}, r"privacy\.clip_quantile: expected in \(0, 1\)"),
        ({"clip_learning_rate": 0.0}, r"privacy\.clip_learning_rate: expected > 0, got 0"),
        ({"count_noise": -1.0, "clip_quantile": 0.5}, r"privacy\.count_noise: expected >= 0 clients"),
        ({"count_noise": 1.0}, r"privacy\.count_noise=1 and privacy\.clip_quantile=0: nothing is counted"),
    ],
)  # fmt: skip
def test_a_clip_norm_that_moves_has_ranges_too(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CentralPrivacy(name="central", **changes)


@pytest.mark.parametrize("name", PRIVACY)
def test_secure_aggregation_is_refused_with_the_reason(name: Any) -> None:
    expected = (
        r"privacy\.secure_aggregation=true: Flower 1\.41 has SecAgg\+ only for its older client API"
    )
    with pytest.raises(ConfigError, match=expected):
        PRIVACY[name](name=name, secure_aggregation=True)


def test_the_denominator_is_what_the_settings_expect() -> None:
    coins = CentralPrivacy(name="central")
    assert coins.expected_clients(50, 0.25) == 12.5
    fixed = CentralPrivacy(name="central", cohort="fixed")
    assert fixed.expected_clients(50, 0.25) == 13
    assert fixed.expected_clients(50, 0.001) == 1


def test_counting_takes_a_twentieth_of_the_cohort_unless_it_is_given() -> None:
    moving = CentralPrivacy(name="central", clip_quantile=0.5)
    assert moving.count_deviation(50) == 2.5
    assert moving.sum_noise(50) == noise_beside_count(1.0, 2.5)
    given = CentralPrivacy(name="central", clip_quantile=0.5, count_noise=4.0)
    assert given.sum_noise(50) == noise_beside_count(1.0, 4.0)
    with pytest.raises(ConfigError, match="expected a count noise above noise_multiplier / 2"):
        moving.sum_noise(10)


def test_what_is_not_noised_or_not_counted_needs_no_noise_for_it() -> None:
    assert CentralPrivacy(name="central").count_deviation(50) == 0
    assert CentralPrivacy(name="central").sum_noise(50) == 1
    silent = CentralPrivacy(name="central", noise_multiplier=0.0, clip_quantile=0.5)
    assert (silent.count_deviation(50), silent.sum_noise(50)) == (0, 0)


def test_randomness_is_the_seeds_only_where_it_hides_nothing() -> None:
    assert not CentralPrivacy(name="central").is_seeded
    assert CentralPrivacy(name="central", reproducible_noise=True).is_seeded
    assert CentralPrivacy(name="central", noise_multiplier=0.0).is_seeded


def test_the_table_names_its_settings() -> None:
    for name, settings in (
        ("none", NoPrivacy),
        ("central", CentralPrivacy),
        ("local", LocalPrivacy),
        ("sample", SamplePrivacy),
    ):
        assert PRIVACY[name] is settings
    assert len(PRIVACY) == 4
