import math

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import single_release_epsilon, sum_epsilon
from fedllm_flwr.settings.accounts import (
    PRECISION,
    bound_epsilon,
    epsilon_of,
    exact_epsilon,
    noise_for,
    noise_for_rows,
    noised_steps,
    rounded_up,
    rows_epsilon,
)
from fedllm_flwr.settings.adaptation import ClientConfig
from fedllm_flwr.settings.privacy import CentralPrivacy, LocalPrivacy


def test_each_mechanism_has_its_own_epsilon() -> None:
    central, local = CentralPrivacy(name="central"), LocalPrivacy(name="local")
    assert epsilon_of(central, 0, 10, 0.5) == 0.0
    assert epsilon_of(central, 3, 10, 0.5) == sum_epsilon(1.0, 3, 1e-5, 0.5)
    assert epsilon_of(local, 3, 10, 0.5) == single_release_epsilon(1.0, 3, 1e-5)
    fixed = CentralPrivacy(name="central", cohort="fixed")
    assert epsilon_of(fixed, 3, 10, 0.5) > epsilon_of(central, 3, 10, 0.5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_least_noise_that_keeps_a_target_is_found_and_never_less(scale: float) -> None:
    found = noise_for(2.0, lambda sigma: scale / sigma)
    assert scale / found <= 2.0
    assert found <= scale / 2.0 * (1 + PRECISION) * 1.002
    assert float(f"{found:.4g}") == found


def test_a_target_that_no_noise_keeps_is_named() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.target_epsilon: .* keeps, got 0.5"):
        noise_for(0.5, lambda sigma: 1.0)


def test_rounding_never_goes_down() -> None:
    assert [rounded_up(v) for v in (1.0, 1.23401, 0.00123456, 9999.5)] == [
        1.0, 1.235, 0.001235, 10000.0,
    ]  # fmt: skip


def test_steps_of_epochs_and_of_a_number() -> None:
    assert noised_steps(ClientConfig(batch_size=4, local_epochs=2), 10) == (0.4, 6)
    assert noised_steps(ClientConfig(batch_size=4, local_epochs=0, local_steps=5), 3) == (1.0, 5)


def test_the_client_that_has_it_worst_decides() -> None:
    few, many = (0.5, 4), (0.05, 30)
    sigma, delta = 1.5, 1e-5
    each = [exact_epsilon(sigma, n, delta, q) for q, n in (few, many)]
    assert rows_epsilon(sigma, delta, [few, many]) == max(each)
    found = noise_for_rows(1.0, delta, [few, many, many])
    assert rows_epsilon(found, delta, [few, many]) <= 1.0
    assert rows_epsilon(found * 0.99, delta, [few, many]) > 1.0


def test_many_different_clients_are_bounded() -> None:
    accounts = [(0.1 + 0.01 * k, 3) for k in range(17)]
    assert rows_epsilon(2.0, 1e-5, accounts) == bound_epsilon(2.0, 3, 1e-5, accounts[-1][0])
    assert math.isfinite(rows_epsilon(2.0, 1e-5, accounts))
