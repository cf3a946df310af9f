"""Membership inference: can an attacker tell examples that a model was trained on from others of their kind?

Scores are higher for examples that look like members. Members are the forget set, the others are of the same
distribution and were never trained on: otherwise the attack finds the difference between the sets.

Axes: n examples, m members, o others, S shadow models, t tokens of a text, V words of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from fedllm_flwr.errors import ConfigError, ShapeError

LEAST_SHADOWS = 8
"""Shadow models below which a likelihood ratio is not worth its name."""

SMALLEST_LOSS = 1e-12
"""Nats: a loss of 0 would be infinite confidence."""

LOW_RATE = 0.01
"""False positive rate at which an attack's hits are reported."""

Spread = Literal["shared", "example"]


@dataclass(frozen=True)
class Interval:
    """A figure and where it may lie.

    Attributes:
        value: The figure.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AttackResult:
    """What an attack achieves.

    Attributes:
        auc: Probability that a member scores above an other; 0.5 is a coin.
        low_rate_hits: Share of members found while 1 % of the others are taken for members at most.
        members: How many (m).
        others: How many (o); below 100 no other at all may be taken for a member.
    """

    auc: Interval
    low_rate_hits: Interval
    members: int
    others: int


def auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half.

    Args:
        members: Scores. [..., m]
        others: Scores, of the same leading axes. [..., o]

    Returns:
        [...].

    Source:
        Hanley and McNeil 1982: the area is Wilcoxon's statistic.
    """
    m, o = members.shape[-1], others.shape[-1]
    ranks = stats.rankdata(np.concatenate([members, others], axis=-1), axis=-1)
    area: np.ndarray = (ranks[..., :m].sum(-1) - m * (m + 1) / 2) / (m * o)
    return area


def hits_at(members: np.ndarray, others: np.ndarray, rate: float = LOW_RATE) -> np.ndarray:
    """True positive rate at the lowest threshold whose false positive rate is not above a given one.

    Args:
        members: Scores. [..., m]
        others: Scores, of the same leading axes. [..., o]
        rate: Largest false positive rate, in [0, 1).

    Returns:
        [...]. The curve is not interpolated: what is reported, the attacker really reaches.

    Raises:
        ConfigError: The rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"attack: expected a false positive rate in [0, 1), got {rate}")
    # so many others may score above the threshold; the guard is for products such as 100 * 0.29
    allowed = int(rate * others.shape[-1] + 1e-9)
    threshold = np.sort(others, axis=-1)[..., others.shape[-1] - 1 - allowed]
    found: np.ndarray = (members > threshold[..., None]).mean(-1)
    return found


def attack(
    members: np.ndarray,
    others: np.ndarray,
    generator: np.random.Generator,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> AttackResult:
    """AUC and hits at 1 % of an attack by its scores, with bootstrap intervals.

    Args:
        members: Scores of the forget set, at least 2. [m]
        others: Scores of examples that were never trained on, at least 2. [o]
        generator: Draws the resamples.
        resamples: How many; members and others are drawn apart, so their numbers stay.
        confidence: Of the percentile intervals, in (0, 1).

    Raises:
        ShapeError: Scores are not flat, too few, or not numbers.
        ConfigError: The resamples or the confidence are out of range.

    Source:
        Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 13 (percentile intervals), two samples.
    """
    for name, scores in (("members", members), ("others", others)):
        if scores.ndim != 1 or scores.size < 2 or np.isnan(scores).any():
            raise ShapeError(
                f"attack: expected at least 2 scores of {name} that are numbers, "
                f"got shape {list(scores.shape)}"
            )
    if resamples < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"attack: expected resamples >= 1 and a confidence in (0, 1), got {resamples} and {confidence}"
        )
    drawn_members = members[generator.integers(members.size, size=(resamples, members.size))]
    drawn_others = others[generator.integers(others.size, size=(resamples, others.size))]

    def interval(figure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Interval:
        tail = (1 - confidence) / 2
        low, high = np.quantile(figure(drawn_members, drawn_others), [tail, 1 - tail])
        return Interval(float(figure(members, others)), float(low), float(high))

    return AttackResult(interval(auc), interval(hits_at), members.size, others.size)


def min_k_plus_plus(
    log_probabilities: np.ndarray, means: np.ndarray, deviations: np.ndarray, share: float = 0.2
) -> float:
    """Min-K%++ score of one text: mean over its least expected tokens of how they stand to what the model expects.

    Args:
        log_probabilities: Of each token given those before it, in nats. [t]
        means: Of the log-probabilities of the vocabulary at that place, as :func:`vocabulary_moments` has them. [t]
        deviations: Their standard deviations, >= 0; of a place that is certain, 0, and its token counts 0. [t]
        share: K, the share of tokens that count, in (0, 1]; one at least does.

    Returns:
        The score, higher for texts that look trained on.

    Raises:
        ShapeError: The arrays differ in shape, are empty or hold values that are not finite.
        ConfigError: The share is out of range.

    Source:
        Zhang et al. 2024, Min-K%++ (arXiv 2404.02936).
    """
    shapes = {log_probabilities.shape, means.shape, deviations.shape}
    if len(shapes) > 1 or log_probabilities.ndim != 1 or not log_probabilities.size:
        raise ShapeError(f"Min-K%++: expected three arrays [tokens], got {sorted(shapes)}")
    if not all(np.isfinite(each).all() for each in (log_probabilities, means, deviations)):
        raise ShapeError("Min-K%++: expected finite log-probabilities and moments, got others")
    if not 0 < share <= 1:
        raise ConfigError(f"Min-K%++: expected a share in (0, 1], got {share}")
    apart = (log_probabilities - means).astype(np.float64)
    normed = np.divide(apart, deviations, out=np.zeros_like(apart), where=deviations > 0)
    count = max(1, int(share * normed.size))
    return float(np.sort(normed)[:count].mean())


def vocabulary_moments(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of log p over the vocabulary, words weighed by p itself.

    Args:
        logits: Of the next token at each place, finite. [t, V]

    Returns:
        float64 [t] and [t], in nats.
    """
    logs = special.log_softmax(logits.astype(np.float64), axis=-1)
    probabilities = np.exp(logs)
    means = (probabilities * logs).sum(-1)
    deviations: np.ndarray = np.sqrt((probabilities * (logs - means[..., None]) ** 2).sum(-1))
    return means, deviations


def logit_confidence(losses: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of p = exp(-loss): near to normal over models, which the likelihood ratio takes for granted.

    Args:
        losses: Per example, >= 0, in nats; for texts the mean per token. Any shape.

    Returns:
        float64 of the same shape.

    Raises:
        ShapeError: A loss is negative or not finite.

    Source:
        Carlini et al. 2022 (LiRA, arXiv 2112.03570), section IV.
    """
    if not (np.isfinite(losses) & (losses >= 0)).all():
        raise ShapeError("confidence: expected finite losses >= 0, got others")
    clipped = np.maximum(losses.astype(np.float64), SMALLEST_LOSS)
    confidence: np.ndarray = -clipped - np.log(-np.expm1(-clipped))
    return confidence


def likelihood_ratio(
    target: np.ndarray,
    shadows: np.ndarray,
    inside: np.ndarray,
    *,
    spread: Spread = "shared",
) -> np.ndarray:
    """LiRA, online: log N(x; μ_in, σ_in) - log N(x; μ_out, σ_out), fitted example by example.

    Args:
        target: Confidence of the attacked model, as of :func:`logit_confidence`. [n]
        shadows: The same of shadow models, each trained on a random half of the examples. [S, n]
        inside: True where a shadow model was trained on an example; of each example at least 2 were and 2 were not.
            [S, n]
        spread: Whose deviations: ``example``'s own, or one of all examples for each side (``shared``), about each
            example's own means. With few shadow models an example's own deviation is mostly noise, and shared ones
            make the stronger attack; LiRA's authors advise them below 64 models.

    Returns:
        Scores, float64 [n].

    Raises:
        ShapeError: The arrays do not fit each other, or hold values that are not finite.
        ConfigError: There are less than 8 shadow models, or less than 2 on a side of an example; or the spread is
            unknown.

    Source:
        Carlini et al. 2022 (LiRA, arXiv 2112.03570), Algorithm 1.
    """
    _check_shadows(target, shadows, inside)
    if spread not in ("shared", "example"):
        raise ConfigError(f"LiRA: spread: expected shared or example, got {spread!r}")
    mean_in, deviation_in = _fitted(shadows, inside, spread)
    mean_out, deviation_out = _fitted(shadows, ~inside, spread)
    x = target.astype(np.float64)
    score: np.ndarray = stats.norm.logpdf(x, mean_in, deviation_in) - stats.norm.logpdf(
        x, mean_out, deviation_out
    )
    return score


def _fitted(
    shadows: np.ndarray, chosen: np.ndarray, spread: Spread
) -> tuple[np.ndarray, np.ndarray]:
    """Means and unbiased deviations [n] over the chosen models of each example."""
    counts = chosen.sum(0)
    wide = np.where(chosen, shadows, 0).astype(np.float64)
    means = wide.sum(0) / counts
    squares = np.where(chosen, (shadows - means) ** 2, 0.0).sum(0)
    if spread == "shared":
        variances = np.full(means.shape, squares.sum() / (counts - 1).sum())
    else:
        variances = squares / (counts - 1)
    # models that all agree would make any difference infinitely telling
    return means, np.sqrt(np.maximum(variances, np.finfo(np.float64).eps))


def _check_shadows(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> None:
    fits = target.ndim == 1 and shadows.shape[1:] == target.shape and inside.shape == shadows.shape
    if not fits or shadows.ndim != 2 or inside.dtype != bool:
        raise ShapeError(
            f"LiRA: expected a target [n], shadows [S, n] and booleans [S, n], got {list(target.shape)}, "
            f"{list(shadows.shape)} and {inside.dtype} {list(inside.shape)}"
        )
    if not np.isfinite(target).all() or not np.isfinite(shadows).all():
        raise ShapeError("LiRA: expected finite confidences, got others")
    fewest = min(int(inside.sum(0).min()), int((~inside).sum(0).min())) if target.size else 0
    if len(shadows) < LEAST_SHADOWS or fewest < 2:
        raise ConfigError(
            f"LiRA: expected at least {LEAST_SHADOWS} shadow models, 2 with and 2 without each example, "
            f"got {len(shadows)}, and {fewest} on a side"
        )
