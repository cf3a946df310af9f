"""A clip norm that follows a quantile of the clients' update norms, at a small price in noise.

Each round the server also sums, over the clients that answer, whether their update was shorter than the clip norm, and
adds noise to that count. The norm then moves towards the wanted share.
"""

import math

import numpy as np

from fedllm_flwr.errors import ConfigError


def noise_beside_count(noise_multiplier: float, count_noise: float) -> float:
    """The noise that updates need so that they and the noised count together cost what ``noise_multiplier`` says.

    Args:
        noise_multiplier: z >= 0, relative to the clip norm: what the account charges.
        count_noise: Standard deviation σ_b of the count's noise, in clients.

    Returns:
        z_Δ >= z: the noise multiplier of the updates; 0 without noise.

    Raises:
        ConfigError: The count alone would cost more: σ_b is not above z / 2.

    Source:
        Andrew et al. 2021, Differentially private learning with adaptive clipping, Theorem 1:
        z_Δ = (z⁻² - (2 σ_b)⁻²)^(-1/2). A client moves the centred count by 1/2 at most.
    """
    if not noise_multiplier:
        return 0.0
    if not count_noise > noise_multiplier / 2:
        raise ConfigError(
            f"adaptive clipping: expected a count noise above noise_multiplier / 2 = {noise_multiplier / 2:g} clients, "
            f"got {count_noise:g}"
        )
    return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)


def next_clip_norm(
    clip_norm: float,
    *,
    below: int,
    count: int,
    expected_clients: float,
    quantile: float,
    learning_rate: float,
    count_noise: float,
    generator: np.random.Generator,
) -> float:
    """The clip norm of the next round.

    Args:
        clip_norm: Of this round, C > 0.
        below: Clients whose update was at most C long.
        count: Clients that answered.
        expected_clients: m > 0, from the settings alone; a client that did not answer counts as half below.
        quantile: Wanted share γ of clients below, in (0, 1).
        learning_rate: η_C > 0.
        count_noise: σ_b >= 0, in clients.
        generator: Draws the noise.

    Returns:
        C exp(-η_C (b̃ - γ)), > 0.

    Source:
        Andrew et al. 2021, Algorithm 1 with the geometric update. Differs in that a fixed number of clients is the
        denominator under Poisson sampling, where the count is centred at 1/2 so that who does not answer is 0.
    """
    noise = count_noise * float(generator.standard_normal()) if count_noise else 0.0
    share = 0.5 + (below - count / 2 + noise) / expected_clients
    return clip_norm * math.exp(-learning_rate * (share - quantile))
