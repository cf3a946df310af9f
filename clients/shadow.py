"""Shadow models: a client trains on a drawn half of all of its rows, so that each row is seen by half of the models.

The likelihood ratio of an attacker compares models that saw a row with models that did not (see
``fedllm_flwr.unlearning.attacks.likelihood_ratio``). Everything but that client's rows is the run as it was.

Source:
    Carlini et al. 2022 (LiRA, arXiv 2112.03570), section IV-A; the other clients' federation is part of "training".
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedllm_flwr.config import RunConfig
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.partitions import ClientRows


def inside(rows: int, client: int, shadow: int, seed: int) -> np.ndarray:
    """Which of a client's rows a shadow model is trained on; models 2k and 2k + 1 have complementary halves.

    Args:
        rows: How many the client has in all splits, in the order of training, validation and test rows.
        client: Whose.
        shadow: Number of the model.
        seed: Of the run's rows.

    Returns:
        Booleans [rows].
    """
    order = numpy_generator(seed, "shadow", client, shadow // 2).permutation(rows)
    first = np.zeros(rows, dtype=bool)
    first[order[: (rows + 1) // 2]] = True
    return first if shadow % 2 == 0 else ~first


def shadowed(config: RunConfig, clients: Sequence[ClientRows]) -> tuple[ClientRows, ...]:
    """The clients' rows; in a shadow model's run one of them trains on a half of its own."""
    client, shadow = config.unlearning.shadowed, config.unlearning.shadow
    if client < 0:
        return tuple(clients)
    own = clients[client]
    every = (*own.train, *own.validation, *own.test)
    chosen = inside(len(every), client, shadow, config.rows_seed)
    train = tuple(row for row, taken in zip(every, chosen, strict=True) if taken)
    half = dataclasses.replace(own, train=train)
    return (*clients[:client], half, *clients[client + 1 :])
