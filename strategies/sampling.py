"""Cohorts drawn from (seed, round) over partition ids.

Flower's own sampler draws node ids from an unseeded generator, and node ids are random per run. Ours draws clients,
so a cohort is the same whatever nodes host them.
"""

from collections.abc import Sequence

from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.settings.federation import cohort_size


def draw_cohort(
    seed: int, server_round: int, partition_ids: Sequence[int], fraction: float
) -> list[int]:
    """Draw one round's cohort without replacement.

    Args:
        seed: The experiment's seed.
        server_round: 1-based round.
        partition_ids: All clients.
        fraction: Of the clients, in (0, 1]; at least one client is drawn.

    Returns:
        Partition ids, ascending.

    Raises:
        ValueError: There are no clients, or the fraction is outside (0, 1].
    """
    if not partition_ids or not 0 < fraction <= 1:
        raise ValueError(
            f"cohort: expected clients and a fraction in (0, 1], got {len(partition_ids)} and {fraction}"
        )
    size = cohort_size(len(partition_ids), fraction)
    generator = numpy_generator(seed, "cohort", server_round)
    chosen = generator.choice(len(partition_ids), size=size, replace=False)
    return sorted(partition_ids[int(i)] for i in chosen)


def draw_poisson_cohort(
    seed: int, server_round: int, partition_ids: Sequence[int], rate: float
) -> list[int]:
    """Draw one round's cohort with a coin for each client: the sampling that the sampled Gaussian's account is of.

    Args:
        seed: What nobody may know from whom the cohort is hidden.
        server_round: 1-based round.
        partition_ids: All clients.
        rate: Each client's chance, in (0, 1].

    Returns:
        Partition ids, ascending; possibly none.

    Raises:
        ValueError: There are no clients, or the rate is outside (0, 1].
    """
    if not partition_ids or not 0 < rate <= 1:
        raise ValueError(
            f"cohort: expected clients and a rate in (0, 1], got {len(partition_ids)} and {rate}"
        )
    chances = numpy_generator(seed, "poisson cohort", server_round).random(len(partition_ids))
    return sorted(p for p, chance in zip(partition_ids, chances, strict=True) if chance < rate)
