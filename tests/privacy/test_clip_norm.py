import math

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import next_clip_norm, noise_beside_count, single_release_epsilon


def test_sum_and_count_together_cost_what_was_asked_for() -> None:
    """Two Gaussian releases at once are one whose squared inverse deviations add up."""
    for z, count in ((1.0, 2.5), (0.5, 0.3), (3.0, 20.0)):
        beside = noise_beside_count(z, count)
        assert beside > z
        together = (beside**-2 + (2 * count) ** -2) ** -0.5
        assert together == pytest.approx(z, rel=1e-12)
        assert single_release_epsilon(together, 1, 1e-5) == pytest.approx(
            single_release_epsilon(z, 1, 1e-5), rel=1e-6
        )


def test_the_papers_example() -> None:
    """A twentieth of 100 clients costs 0.5 % more noise at z = 1: sqrt(1 / (1 - 1 / 100))."""
    assert noise_beside_count(1.0, 100 / 20) == pytest.approx(math.sqrt(100 / 99))


def test_without_noise_there_is_none_beside_the_count() -> None:
    assert noise_beside_count(0.0, 0.0) == 0.0


@pytest.mark.parametrize("count", [0.0, 0.4, 0.5])
def test_a_count_that_costs_more_than_all_is_refused(count: float) -> None:
    with pytest.raises(ConfigError, match=r"above noise_multiplier / 2 = 0\.5 clients, got"):
        noise_beside_count(1.0, count)


def moved(clip_norm: float, below: int, count: int, expected: float, noise: float = 0.0) -> float:
    return next_clip_norm(
        clip_norm, below=below, count=count, expected_clients=expected, quantile=0.5,
        learning_rate=0.2, count_noise=noise, generator=np.random.default_rng(3),
    )  # fmt: skip


def test_the_norm_moves_towards_the_quantile() -> None:
    assert moved(2.0, 8, 8, 8.0) == pytest.approx(2.0 * math.exp(-0.1))
    assert moved(2.0, 0, 8, 8.0) == pytest.approx(2.0 * math.exp(0.1))
    assert moved(2.0, 4, 8, 8.0) == 2.0


def test_who_does_not_answer_pulls_to_neither_side() -> None:
    assert moved(2.0, 0, 0, 8.0) == 2.0
    assert moved(2.0, 2, 2, 8.0) == pytest.approx(2.0 * math.exp(-0.2 / 8))


def test_it_finds_the_median_of_norms() -> None:
    random, norm = np.random.default_rng(4), 0.01
    for _ in range(300):
        norms = random.lognormal(0.0, 0.5, 50)
        norm = next_clip_norm(
            norm, below=int((norms <= norm).sum()), count=50, expected_clients=50.0, quantile=0.5,
            learning_rate=0.2, count_noise=2.5, generator=random,
        )  # fmt: skip
    assert norm == pytest.approx(1.0, rel=0.15)


def test_noise_on_the_count_moves_the_norm() -> None:
    assert moved(2.0, 4, 8, 8.0, noise=1.0) != 2.0
