"""The noise of a run that says which ε it wants, computed before anything starts."""

import os
from dataclasses import replace

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.privacy import sum_rdp_epsilon
from fedllm_flwr.settings.accounts import (
    Account,
    epsilon_of,
    noise_for,
    noise_for_rows,
    noised_steps,
)
from fedllm_flwr.settings.privacy import CentralPrivacy, NoPrivacy, SamplePrivacy
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import partition

UNSET = 1.0
"""What ``privacy.noise_multiplier`` is when nobody sets it."""


def with_target_noise(config: RunConfig) -> RunConfig:
    """The run with the noise multiplier that keeps ``privacy.target_epsilon`` over all of its rounds.

    Under ``central`` each round is one release. Under ``local`` each client is charged for every round, also where
    ``strategy.cohort_fraction`` asks it in fewer. Under ``sample`` so it is too, and the rows of each client are
    counted: the noise is that of the client that needs the most.

    Args:
        config: As it was composed.

    Returns:
        The same object where no ε is wanted.

    Raises:
        ConfigError: The multiplier was set too, or no noise keeps that ε.
    """
    privacy = config.privacy
    if isinstance(privacy, NoPrivacy) or not privacy.target_epsilon:
        return config
    if privacy.noise_multiplier != UNSET:
        raise ConfigError(
            f"privacy.target_epsilon={privacy.target_epsilon:g} and privacy.noise_multiplier="
            f"{privacy.noise_multiplier:g}: one follows from the other, set only one of them"
        )
    target, rounds = privacy.target_epsilon, config.num_rounds
    if isinstance(privacy, SamplePrivacy):
        accounts = [(rate, steps * rounds) for rate, steps in _accounts(config)]
        found = noise_for_rows(target, privacy.delta, accounts)
    else:
        clients, fraction = config.partition.num_clients, config.strategy.cohort_fraction

        def epsilon(sigma: float) -> float:
            return epsilon_of(replace(privacy, noise_multiplier=sigma), rounds, clients, fraction)

        def bound(sigma: float) -> float:
            return sum_rdp_epsilon(sigma, rounds, privacy.delta, fraction)

        draws = isinstance(privacy, CentralPrivacy) and privacy.cohort == "poisson" and fraction < 1
        found = noise_for(target, epsilon, bound if draws else None)
    return replace(config, privacy=replace(privacy, noise_multiplier=found))


def _accounts(config: RunConfig) -> list[Account]:
    """How the rows of each client take part in a round."""
    path = config.runtime.data_path or os.environ.get(DATA_PATH_VARIABLE, "")
    task = load_task(config.task.options(path), config.rows_seed)
    sizes = [len(client.train) for client in partition(task, config.partition, config.rows_seed)]
    return [noised_steps(config.client, size) for size in sizes if size]
