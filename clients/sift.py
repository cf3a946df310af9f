"""What clients of a sign-fixed merge do unlike others: each trains alone, and is served its own masked model."""

import numpy as np

from clients.workspace import Asked
from fedllm_flwr.config import RunConfig
from fedllm_flwr.settings.unlearning import SERVED, SIFT_MERGE


def trains_alone(config: RunConfig) -> bool:
    """Whether no two clients share a pass, and all keep to the run's signs.

    Rows of others in a pass would change a client's update in its last bits, and its update has to be the same
    whoever else takes part.
    """
    return config.strategy.name == SIFT_MERGE


def served(asked: Asked, partition_id: int) -> np.ndarray | None:
    """The values that a client is served in place of the global model's; None where it is served that."""
    return asked.parts.get(f"{SERVED}{partition_id}")
