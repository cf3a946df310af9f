"""Settings of differential privacy: what is clipped, who adds noise, and what may be spent.

What the claim hides is a client with all of its rows (``central``, ``local``), or one row (``sample``). ``delta`` is
the δ that ε is stated at. With ``target_epsilon`` > 0 the noise multiplier is computed before the run, so that all of
its rounds together stay within that ε (see :mod:`fedllm_flwr.noise_target`).
"""

from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.privacy import noise_beside_count
from fedllm_flwr.settings.federation import cohort_size
from fedllm_flwr.settings.tree import require

COUNT_NOISE_SHARE = 20
"""Expected clients over the standard deviation of the count's noise, where it is not given (Andrew et al. 2021)."""


def check_secure_aggregation(secure_aggregation: bool) -> None:
    """Refuse what Flower does not offer for this project's messages.

    Raises:
        ConfigError: It is asked for.
    """
    require(
        not secure_aggregation,
        "privacy.secure_aggregation=true: Flower 1.41 has SecAgg+ only for its older client API and not for messages, "
        "so the server would see every update; use false",
    )


@dataclass(frozen=True, kw_only=True)
class NoPrivacy:
    """No clipping, no noise, no claim."""

    name: Literal["none"]
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        """Check what cannot be had."""
        check_secure_aggregation(self.secure_aggregation)


@dataclass(frozen=True, kw_only=True)
class CentralPrivacy:
    """The server, which is trusted, clips each client's update and adds noise to their sum.

    ``noise_multiplier`` is the standard deviation of the sum's noise over the clip norm. ``cohort`` says how
    ``strategy.cohort_fraction`` draws: each client by itself (``poisson``), or that share of them (``fixed``).
    ``clip_quantile`` > 0 moves the clip norm towards that share of updates below it.
    """

    name: Literal["central"]
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    cohort: Literal["poisson", "fixed"] = "poisson"
    target_epsilon: float = 0.0
    delta: float = 1e-5
    epsilon_budget: float = 0.0
    clip_quantile: float = 0.0
    clip_learning_rate: float = 0.2
    count_noise: float = 0.0
    reproducible_noise: bool = False
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        check_secure_aggregation(self.secure_aggregation)
        _check_mechanism(self)
        require(
            0 <= self.clip_quantile < 1,
            f"privacy.clip_quantile: expected in (0, 1), or 0 for a fixed clip norm, got {self.clip_quantile:g}",
        )
        require(
            self.clip_learning_rate > 0,
            f"privacy.clip_learning_rate: expected > 0, got {self.clip_learning_rate:g}",
        )
        require(
            self.count_noise >= 0,
            f"privacy.count_noise: expected >= 0 clients (0 = a twentieth of the cohort), got {self.count_noise:g}",
        )
        require(
            self.count_noise == 0 or self.clip_quantile > 0,
            f"privacy.count_noise={self.count_noise:g} and privacy.clip_quantile=0: nothing is counted, use 0",
        )

    @property
    def is_seeded(self) -> bool:
        """Whether the cohort and the noise come from the run's seed, which every node knows."""
        return self.reproducible_noise or self.noise_multiplier == 0

    def expected_clients(self, num_clients: int, cohort_fraction: float) -> float:
        """Clients of a round, in the mean over rounds: the denominator of every sum."""
        if self.cohort == "poisson":
            return num_clients * cohort_fraction
        return float(cohort_size(num_clients, cohort_fraction))

    def count_deviation(self, expected_clients: float) -> float:
        """Standard deviation of the count's noise, in clients; 0 where nothing is counted or nothing is noised."""
        if not self.clip_quantile or not self.noise_multiplier:
            return 0.0
        return self.count_noise or expected_clients / COUNT_NOISE_SHARE

    def sum_noise(self, expected_clients: float) -> float:
        """Noise multiplier of the updates, so that with the count's noise they cost ``noise_multiplier``.

        Raises:
            ConfigError: The count's noise is too small for that.
        """
        if not self.clip_quantile:
            return self.noise_multiplier
        return noise_beside_count(self.noise_multiplier, self.count_deviation(expected_clients))


@dataclass(frozen=True, kw_only=True)
class LocalPrivacy:
    """Each client clips its update and adds noise itself, with randomness that the server cannot know.

    ``noise_multiplier`` is the standard deviation of each value's noise over the clip norm.
    """

    name: Literal["local"]
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    target_epsilon: float = 0.0
    delta: float = 1e-5
    epsilon_budget: float = 0.0
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        check_secure_aggregation(self.secure_aggregation)
        _check_mechanism(self)


@dataclass(frozen=True, kw_only=True)
class SamplePrivacy:
    """Each client trains by clipped gradients of single rows and noise, so that no row of its can be told (DP-SGD).

    ``noise_multiplier`` is the standard deviation of the noise on the sum of a step over the clip norm.
    """

    name: Literal["sample"]
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    target_epsilon: float = 0.0
    delta: float = 1e-5
    epsilon_budget: float = 0.0
    secure_aggregation: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        check_secure_aggregation(self.secure_aggregation)
        _check_mechanism(self)


def _check_mechanism(options: CentralPrivacy | LocalPrivacy | SamplePrivacy) -> None:
    require(
        options.clip_norm > 0,
        f"privacy.clip_norm: expected > 0, got {options.clip_norm:g}",
    )
    require(
        options.noise_multiplier >= 0,
        f"privacy.noise_multiplier: expected >= 0 clip norms, got {options.noise_multiplier:g}",
    )
    require(
        options.target_epsilon >= 0
        and (options.target_epsilon == 0 or options.noise_multiplier > 0),
        "privacy.target_epsilon: expected >= 0 (0 = privacy.noise_multiplier says how much noise there is), and noise, "
        f"got {options.target_epsilon:g} and noise_multiplier={options.noise_multiplier:g}",
    )
    require(0 < options.delta < 1, f"privacy.delta: expected in (0, 1), got {options.delta:g}")
    require(
        options.epsilon_budget >= 0,
        f"privacy.epsilon_budget: expected >= 0 (0 = no budget), got {options.epsilon_budget:g}",
    )
    require(
        options.epsilon_budget == 0 or options.noise_multiplier > 0,
        f"privacy.epsilon_budget={options.epsilon_budget:g} and privacy.noise_multiplier=0: without noise every round "
        "costs more than any budget",
    )


PrivacyConfig = NoPrivacy | CentralPrivacy | LocalPrivacy | SamplePrivacy
PRIVACY = {
    "none": NoPrivacy,
    "central": CentralPrivacy,
    "local": LocalPrivacy,
    "sample": SamplePrivacy,
}
