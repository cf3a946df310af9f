import json
from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.noise_target import with_target_noise
from fedllm_flwr.privacy import single_release_epsilon, sum_epsilon
from fedllm_flwr.settings.accounts import noised_steps

Fixture = Callable[..., Any]
CENTRAL = ("privacy=central", "strategy.weighting=uniform", "method.sharing=b_only")
SAMPLE = ("privacy=sample", "client.clip_norm=0", "strategy.max_retries=0")


def test_without_a_target_nothing_is_computed(micro: Fixture) -> None:
    for config in (micro(), micro(*CENTRAL)):
        assert with_target_noise(config) is config


@pytest.mark.parametrize(("rounds", "fraction", "target"), [(30, 0.1, 1.0), (8, 0.5, 8.0)])
def test_the_noise_of_a_central_run_keeps_its_target_by_two_accountants(
    rounds: int, fraction: float, target: float, smoke: Fixture
) -> None:
    opacus = pytest.importorskip("opacus.accountants")
    config = smoke(
        *CENTRAL, f"privacy.target_epsilon={target}", f"num_rounds={rounds}",
        f"strategy.cohort_fraction={fraction}",
    )  # fmt: skip
    sigma, delta = config.privacy.noise_multiplier, config.privacy.delta
    assert sum_epsilon(sigma, rounds, delta, fraction) <= target
    assert sum_epsilon(0.99 * sigma, rounds, delta, fraction) > target
    prv = opacus.PRVAccountant()
    prv.history = [(sigma, fraction, rounds)]
    # Opacus gives the upper end of its estimate, whose error is 0.01 by default
    assert prv.get_epsilon(delta) == pytest.approx(target, abs=0.02, rel=0.005)


def test_the_noise_of_a_local_run(smoke: Fixture) -> None:
    config = smoke(
        "privacy=local", "privacy.target_epsilon=4", "num_rounds=5", "strategy.max_retries=0"
    )
    sigma, delta = config.privacy.noise_multiplier, config.privacy.delta
    assert (
        single_release_epsilon(sigma, 5, delta)
        <= 4
        < single_release_epsilon(0.99 * sigma, 5, delta)
    )


def test_the_noise_of_single_rows_is_that_of_the_worst_client_and_is_in_the_manifest(
    micro: Fixture, play: Fixture
) -> None:
    config = micro(*SAMPLE, "privacy.target_epsilon=6", "privacy.delta=1e-3", "num_rounds=1")
    sigma = config.privacy.noise_multiplier
    played = play(config)
    told = [r["rows"] for r in played.run.records("privacy") if r["rows"]]
    sizes = {int(p): n for rows in told for p, n in rows.items()}
    accounts = [noised_steps(config.client, n) for n in sizes.values()]
    spent = [sum_epsilon(sigma, steps, 1e-3, rate) for rate, steps in accounts]
    less = [sum_epsilon(0.98 * sigma, steps, 1e-3, rate) for rate, steps in accounts]
    assert max(spent) <= 6 < max(less)
    assert played.run.records("privacy")[-1]["epsilon"] == pytest.approx(max(spent))
    manifest = json.loads((played.run.path / "manifest.json").read_text())["config"]["privacy"]
    assert (manifest["target_epsilon"], manifest["noise_multiplier"]) == (6.0, sigma)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("privacy.noise_multiplier=2",), "one follows from the other, set only one of them"),
        (("privacy.target_epsilon=-1",), r"privacy\.target_epsilon: expected >= 0"),
        (("privacy.noise_multiplier=0",), r"privacy\.target_epsilon: expected .* and noise, got 3"),
        (("privacy=local", "strategy.max_retries=2"), r"privacy\.target_epsilon=3, privacy=local and strategy\.max"),
        (("privacy=sample", "client.clip_norm=0", "strategy.max_retries=0", "runtime=deployment",
          "runtime.connection=x"), r"target_epsilon=3, privacy=sample and runtime=deployment"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(overrides: tuple[str, ...], reason: str, smoke: Fixture) -> None:
    first = () if any(o.startswith("privacy=") for o in overrides) else CENTRAL
    with pytest.raises(ConfigError, match=reason):
        smoke(*first, "privacy.target_epsilon=3", *overrides)
