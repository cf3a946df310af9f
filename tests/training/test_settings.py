import math

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy, scheduled_rate


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", 0, ">= 1"),
        ("local_epochs", 0, ">= 1"),
        ("gradient_accumulation", 0, ">= 1"),
        ("local_steps", -1, ">= 0"),
        ("cohort_tokens", -1, ">= 0"),
        ("learning_rate", math.nan, "finite"),
        ("weight_decay", -0.1, "finite and >= 0"),
        ("clip_norm", math.inf, "finite"),
        ("proximal_mu", -1.0, ">= 0"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("beta2", 1.0, r"in \[0, 1\)"),
        ("optimizer", "adam", "adamw or sgd"),
        ("side", "c", "both, a or b"),
    ],
)
def test_a_value_outside_its_range_is_named(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be .*{expected}.*got"):
        LocalSettings(**{field: value})


@pytest.mark.parametrize(
    ("clip_norm", "noise_multiplier", "message"),
    [
        (0.0, 1.0, "clip_norm must be > 0, got 0.0"),
        (math.nan, 0.0, "clip_norm must be > 0, got nan"),
        (1.0, -0.5, "noise_multiplier must be finite and >= 0, got -0.5"),
        (1.0, math.inf, "noise_multiplier must be finite and >= 0, got inf"),
        (
            math.inf,
            0.5,
            "clip_norm must be finite, as the unit of sample_privacy.noise_multiplier=0.5",
        ),
    ],
)
def test_privacy_outside_its_range_is_named(
    clip_norm: float, noise_multiplier: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"sample_privacy.{message}"):
        SamplePrivacy(clip_norm=clip_norm, noise_multiplier=noise_multiplier)


def test_a_clip_of_the_whole_gradient_does_not_go_with_clips_of_rows() -> None:
    privacy = SamplePrivacy(clip_norm=1.0, noise_multiplier=0.0)
    wanted = "clip_norm must be 0 with sample_privacy, which clips each row instead, got 0.5"
    with pytest.raises(ConfigError, match=wanted):
        LocalSettings(clip_norm=0.5, sample_privacy=privacy)
    assert LocalSettings(sample_privacy=privacy).sample_privacy == privacy


def rates(schedule: str, num_rounds: int, **options: float) -> list[float]:
    return [
        scheduled_rate(0.8, schedule, server_round=r, num_rounds=num_rounds, **options)
        for r in range(1, num_rounds + 1)
    ]


def test_constant_is_exactly_the_base() -> None:
    assert rates("constant", 4, minimum_fraction=0.3) == [0.8] * 4


def test_linear_by_hand() -> None:
    assert rates("linear", 5) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    # 0.25 of the base is left in the last round
    assert rates("linear", 3, minimum_fraction=0.25) == pytest.approx([0.8, 0.5, 0.2])


def test_cosine_by_hand() -> None:
    half = math.sqrt(0.5)
    wanted = [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half), 0.0]
    assert rates("cosine", 5) == pytest.approx(wanted, abs=1e-12)


def test_warm_up_rises_to_the_peak_and_then_decays_over_what_is_left() -> None:
    wanted = [0.8 / 3, 1.6 / 3, 0.8, 0.4, 0.0]
    assert rates("linear", 5, warmup_rounds=2) == pytest.approx(wanted)


def test_one_round_and_rounds_after_the_end() -> None:
    assert rates("cosine", 1) == [0.8]
    later = scheduled_rate(0.8, "linear", server_round=9, num_rounds=3, minimum_fraction=0.5)
    assert later == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("schedule", "server_round", "fraction", "message"),
    [
        ("step", 1, 0.0, "schedule must be constant, cosine or linear"),
        ("linear", 0, 0.0, "server_round must be >= 1"),
        ("linear", 1, 1.5, r"minimum_fraction must be in \[0, 1\]"),
    ],
)
def test_impossible_schedules(
    schedule: str, server_round: int, fraction: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduled_rate(
            1.0, schedule, server_round=server_round, num_rounds=3, minimum_fraction=fraction
        )
