"""How much each client counts in a mean.

Weights are unnormalised: a mean adds them up as clients come in and divides by their total at the end.
"""

from typing import Literal, get_args

from fedllm_flwr.averaging.checks import check_weight
from fedllm_flwr.errors import ConfigError

Weighting = Literal["examples", "uniform"]


def client_weight(weighting: Weighting, num_examples: float, *, client: int | str) -> float:
    """Weight of one client in the mean over its cohort.

    Args:
        weighting: ``examples``: proportional to the examples trained on, which makes the cohort's mean loss that of
            the pooled data. ``uniform``: every client counts the same.
        num_examples: Training examples of this client, > 0 under both weightings: a client without examples has
            nothing to contribute.
        client: The client's partition id, for the message.

    Returns:
        The unnormalised weight, > 0.

    Raises:
        ConfigError: The weighting is unknown; lists the known ones.
        WireError: The number of examples is not a positive finite number; names the client.

    Source:
        McMahan et al. 2017, Algorithm 1 (n_k / n) for ``examples``.
    """
    if weighting not in get_args(Weighting):
        known = ", ".join(get_args(Weighting))
        raise ConfigError(f"weighting: expected one of {known}, got {weighting!r}")
    checked = check_weight(num_examples, f"client {client}")
    return checked if weighting == "examples" else 1.0
