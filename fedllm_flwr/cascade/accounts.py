"""What a cascade costs: every token of every member of every tier that a query visits.

Two accounts. Money counts each member in full, whatever runs beside what. The time of hardware counts k members that
run side by side as k^ρ of one: ρ = 1 one after the other, ρ = 0 all at once.

A known mistake is to count only the calls to the large model. Then a cascade seems cheaper than its own first tier,
which every query visits; here it cannot.

Axes: Q queries.

Source:
    Kolawole et al. 2025 (arXiv 2407.02348), the cost k^ρ·γ + p.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedllm_flwr.errors import ConfigError

NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?")
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Price:
    """What a token of a tier costs, in the user's own unit, exact.

    Attributes:
        input: For each token read, >= 0.
        output: For each token written, >= 0.

    Raises:
        ConfigError: A price is negative.
    """

    input: Fraction = Fraction(1)
    output: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        if self.input < 0 or self.output < 0:
            raise ConfigError(
                f"price: expected input and output >= 0, got {float(self.input)} and {float(self.output)}"
            )

    def cost(self, input_tokens: int, output_tokens: int) -> Fraction:
        """Cost of so many tokens, exact."""
        return self.input * input_tokens + self.output * output_tokens


TOKENS = Price()
"""Every token costs 1: the cost is the number of tokens."""


def parse_prices(text: str, tiers: Sequence[str]) -> dict[str, Price]:
    """Prices as they are typed: ``small:0.1/0.1,large:0.9/0.9``, for each tier input/output.

    Args:
        text: The prices; empty: every token costs 1.
        tiers: Names of all tiers.

    Returns:
        A price for each tier, in the order of the tiers.

    Raises:
        ConfigError: An entry cannot be read, or a tier is unknown, given twice, or lacking.
    """
    if not text.strip():
        return dict.fromkeys(tiers, TOKENS)
    found: dict[str, Price] = {}
    for entry in text.split(","):
        tier, _, prices = entry.strip().rpartition(":")
        numbers = [part.strip() for part in prices.split("/")]
        if not tier or len(numbers) != 2 or not all(NUMBER.fullmatch(n) for n in numbers):
            raise ConfigError(
                f"prices: expected tier:input/output, such as small:0.1/0.1, got {entry.strip()!r}"
            )
        if tier not in tiers or tier in found:
            raise ConfigError(
                f"prices: expected each of the tiers {', '.join(tiers)} once, got {tier!r}"
                f"{' again' if tier in found else ''}"
            )
        found[tier] = Price(*(Fraction(number) for number in numbers))
    lacking = [tier for tier in tiers if tier not in found]
    if lacking:
        raise ConfigError(
            f"prices: expected each of the tiers {', '.join(tiers)} once, got none for {lacking[0]!r}"
        )
    return {tier: found[tier] for tier in tiers}


@dataclass(frozen=True)
class TierLoad:
    """A tier for the closed forms.

    Attributes:
        relative_cost: Of one member for one query, relative to a unit of your choice (γ, if that is one member of the
            last tier), >= 0.
        members: k, >= 1.
        parallelism: ρ in [0, 1]: 1 members run one after the other, 0 all at once.

    Raises:
        ConfigError: A figure is out of range.
    """

    relative_cost: float
    members: int = 1
    parallelism: float = 1.0

    def __post_init__(self) -> None:
        if self.relative_cost < 0 or self.members < 1 or not 0 <= self.parallelism <= 1:
            raise ConfigError(
                f"tier: expected relative_cost >= 0, members >= 1 and parallelism in [0, 1], "
                f"got {self.relative_cost}, {self.members} and {self.parallelism}"
            )

    @property
    def cost(self) -> float:
        """Of the whole tier for one query, k^ρ·γ."""
        return float(self.members**self.parallelism) * self.relative_cost


def expected_cost(tiers: Sequence[TierLoad], deferral: Sequence[float]) -> float:
    """Expected cost of a query over a chain, Σ_t k_t^ρ_t γ_t Π_{s<t} p_s.

    Args:
        tiers: From the first to the last.
        deferral: p_t, the share of the queries that reach tier t and are deferred by it; of every tier but the last.

    Returns:
        In the tiers' unit. For two tiers, the last of one member and cost 1: k^ρ·γ + p.

    Raises:
        ConfigError: There is no tier, the lengths do not fit, or a share is not in [0, 1].
    """
    if not tiers or len(deferral) != len(tiers) - 1:
        raise ConfigError(
            f"cascade: expected a deferral share for every tier but the last, got {len(deferral)} for {len(tiers)}"
        )
    odd = [share for share in deferral if not 0 <= share <= 1]
    if odd:
        raise ConfigError(f"cascade: expected deferral shares in [0, 1], got {odd[0]}")
    reached = np.cumprod([1.0, *deferral])
    return float(sum(tier.cost * share for tier, share in zip(tiers, reached, strict=True)))


def break_even_deferral(first: TierLoad) -> float:
    """The share of deferred queries below which a cascade of two tiers saves, 1 − k^ρ·γ.

    Args:
        first: Its cost relative to one query of the last tier.

    Returns:
        Negative where the first tier alone costs more than the last.
    """
    return 1 - first.cost


def side_by_side(cost: Fraction | float, members: int, parallelism: float) -> float:
    """The cost of members that run side by side, k^ρ times their mean.

    Args:
        cost: Of all members together, one after the other.
        members: k.
        parallelism: ρ in [0, 1].

    Raises:
        ConfigError: ρ is out of range.
    """
    if not 0 <= parallelism <= 1:
        raise ConfigError(f"parallelism: expected in [0, 1], got {parallelism}")
    return float(cost) * float(members) ** (parallelism - 1)


def latency_percentiles(seconds: np.ndarray) -> dict[int, float]:
    """p50, p95 and p99 of the queries' times, interpolated linearly between neighbours.

    Args:
        seconds: Of each query. [Q]

    Raises:
        ConfigError: There is no query.
    """
    if not seconds.size:
        raise ConfigError("latency: expected at least one query, got none")
    found = np.percentile(seconds, PERCENTILES)
    return {percent: float(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def total_cost(
    tokens: Mapping[str, tuple[int, int]], prices: Mapping[str, Price]
) -> dict[str, Fraction]:
    """Cost of each tier from its token log, exact.

    Args:
        tokens: Tokens read and written by all members of a tier together, by tier.
        prices: By tier.

    Returns:
        By tier, in the order of the log.

    Raises:
        ConfigError: A tier has no price.
    """
    lacking = [tier for tier in tokens if tier not in prices]
    if lacking:
        raise ConfigError(f"prices: expected one for tier {lacking[0]!r}, got none")
    return {tier: prices[tier].cost(read, written) for tier, (read, written) in tokens.items()}
