"""Whether a client was forgotten: by comparison with models that were retrained without it.

"The attack does no better than a coin" proves nothing: a model that never remembered passes, and one that forgot too
much is as different from a retrained one as one that forgot too little. So each figure of the unlearned model is held
against the same figure of several retrained models that differ by their seed, and must be *shown* to lie within a
margin of them. A test that cannot show it says so. And the battery is itself on trial: models that are known not to
have forgotten must not pass.

What counts as no difference is stated before the unlearned model is looked at: a margin, or a share of what the full
model gives away beyond retrained ones, where that is more (:func:`stated_margin`). A check that cannot tell the full
model from retrained ones proves nothing about any other model, and is left out (:func:`tells`).

False alarms: a retrained model does not pass a check if the retrained ones scatter too widely for the margin. Where
their deviation is a third of the margin, 27 % of retrained models do not pass beside 3 others, 7 % beside 5 and 3 %
beside 8; where it is a quarter, 8 %, 0.7 % and 0.2 % (:func:`false_alarm_rate`). More examples narrow the scatter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import Interval
from fedllm_flwr.unlearning.budget import ALPHA, ATTACKABLE, MARGIN

Outcome = Literal["passed", "failed", "inconclusive"]
Decision = Literal["pass", "fail", "inconclusive", "void"]
Side = Literal["both", "above", "below"]

CONTROLS = ("no_op", "gradient_ascent", "refusal_wrapper", "adapter_noise")
"""Unlearners that do not unlearn. All of them have to fail."""

LEAST_RETRAINS = 3


@dataclass(frozen=True)
class Check:
    """One figure of the unlearned model beside those of retrained ones.

    Attributes:
        name: Which figure, with its unit.
        measured: Of the unlearned model.
        null: Of each retrained model.
        margin: Difference that counts as none, in the figure's unit.
        side: Which differences count: more than retrained (``above``), less (``below``) or ``both``.
        difference: The measured figure less the mean of the null, with its interval: of 1 - 2 alpha for a side of
            ``both``, and of which one end counts for the others.
        outcome: ``passed`` if the interval is within the margin; ``failed`` if the difference is beyond both the
            margin and what one more retrained model's would be; else ``inconclusive``.
    """

    name: str
    measured: float
    null: tuple[float, ...]
    margin: float
    side: Side
    difference: Interval
    outcome: Outcome


def equivalence(
    name: str,
    measured: float,
    null: Sequence[float],
    *,
    margin: float = MARGIN,
    side: Side = "both",
    alpha: float = ALPHA,
) -> Check:
    """Test whether a figure is what a retrained model's would be, to a margin (two one-sided tests).

    The examples and the unlearned model are given, and so is its figure; what is drawn is the seeds of the retrained
    models, of which R are known. Their mean is known to t s / √R, so far reaches the interval. One more retrained
    model would differ from that mean by up to t s √(1 + 1 / R): only what is farther than this has failed.

    Args:
        name: Of the figure, with its unit.
        measured: Of the unlearned model.
        null: Of R retrained models of different seeds, at least 3, on the same examples.
        margin: >= 0, in the figure's unit, stated before the figure is known.
        side: Which differences matter. Of an attack's AUC both do; of a utility only less (``below``).
        alpha: Of each one-sided test, in (0, 0.5).

    Raises:
        ConfigError: There are less than three retrained models, a figure is not finite, or a setting is out of range.

    Source:
        Schuirmann 1987 (two one-sided tests).
    """
    if len(null) < LEAST_RETRAINS or not np.isfinite([measured, *null]).all():
        raise ConfigError(
            f"check {name}: expected finite figures of at least {LEAST_RETRAINS} retrained models, "
            f"got {measured} and {list(null)}"
        )
    if not 0 <= margin < math.inf or not 0 < alpha < 0.5 or side not in ("both", "above", "below"):
        raise ConfigError(
            f"check {name}: expected a margin >= 0, alpha in (0, 0.5) and a side of both, above or below, "
            f"got {margin}, {alpha} and {side!r}"
        )
    count = len(null)
    scatter = float(stats.t.ppf(1 - alpha, count - 1)) * float(np.std(null, ddof=1))
    half = scatter / math.sqrt(count)
    difference = measured - float(np.mean(null))
    excess = {"both": abs(difference), "above": difference, "below": -difference}[side]
    outcome: Outcome = "inconclusive"
    if excess + half <= margin:
        outcome = "passed"
    elif excess > max(margin, scatter * math.sqrt(1 + 1 / count)):
        outcome = "failed"
    interval = Interval(difference, difference - half, difference + half)
    return Check(name, measured, tuple(null), margin, side, interval, outcome)


def stated_margin(full: float, null: Sequence[float], *, share: float, least: float) -> float:
    """The difference that counts as none: a share of the full model's from retrained ones, and at the least the least.

    It is stated from the full and the retrained models alone, so the unlearned one cannot move it.

    Args:
        full: The figure of the model before removal.
        null: Of retrained models, at least one.
        share: In [0, 1): what may be left of the full model's difference.
        least: >= 0, in the figure's unit.

    Raises:
        ConfigError: An argument is out of range.
    """
    if not null or not 0 <= share < 1 or not 0 <= least < math.inf:
        raise ConfigError(
            f"margin: expected retrained models, a share in [0, 1) and a least margin >= 0, got {len(null)}, {share} "
            f"and {least}"
        )
    return max(least, share * abs(full - float(np.mean(null))))


def tells(full: Check) -> bool:
    """Whether a check can tell the model before removal from retrained ones: else it says nothing about any model."""
    return full.outcome == "failed"


def false_alarm_rate(
    spread: float, retrains: int, *, margin: float = MARGIN, alpha: float = ALPHA
) -> float:
    """Probability that a model which was really retrained does not pass a check of both sides.

    It passes if |D| + t s / √R <= margin, where D is normal with the variance spread² (1 + 1 / R),
    (R - 1) s² / spread² is chi-square, and the two are independent; the rate is one minus the mean of the first's
    probability over the second. Of several checks the battery's rate is their sum at most. Not passing is as a rule
    `inconclusive`, seldom `failed`.

    Args:
        spread: True standard deviation of the figure over seeds, >= 0; of a null it can only be estimated.
        retrains: How many retrained models there are (R), at least 3.
        margin: Of the check.
        alpha: Of each one-sided test, in (0, 0.5).

    Raises:
        ConfigError: An argument is out of range.
    """
    if not 0 <= spread < math.inf or retrains < LEAST_RETRAINS or margin < 0 or not 0 < alpha < 0.5:
        raise ConfigError(
            f"false alarms: expected a spread and a margin >= 0, at least {LEAST_RETRAINS} retrained models and "
            f"alpha in (0, 0.5), got {spread}, {margin}, {retrains} and {alpha}"
        )
    if not spread:
        return 0.0
    freedom, widened = retrains - 1, math.sqrt(1 + 1 / retrains)
    # the mean over the middles of 2000 equally likely slices of the chi-square
    middles = (np.arange(2000) + 0.5) / 2000
    deviations = spread * np.sqrt(stats.chi2.ppf(middles, freedom) / freedom)
    room = margin - float(stats.t.ppf(1 - alpha, freedom)) * deviations / math.sqrt(retrains)
    passes = 2 * stats.norm.cdf(np.maximum(room, 0) / (spread * widened)) - 1
    return 1 - float(passes.mean())


def identity(name: str, different: Sequence[str]) -> Check:
    """The check of an exact method: no array differs from the retrained model's of the same seed by a byte.

    Args:
        name: Of the check.
        different: Names of arrays that do, as :func:`fedllm_flwr.unlearning.distances.different_arrays` finds them.

    Returns:
        A check of their number, with a margin of 0; it has no null, since it is not a statistical one.
    """
    count = float(len(different))
    outcome: Outcome = "failed" if different else "passed"
    return Check(name, count, (), 0.0, "both", Interval(count, count, count), outcome)


def outcome_of(checks: Sequence[Check]) -> Outcome:
    """``failed`` if one failed, else ``inconclusive`` if one is, else ``passed``.

    Raises:
        ConfigError: There are no checks.
    """
    if not checks:
        raise ConfigError("verdict: expected at least one check, got none")
    found = {check.outcome for check in checks}
    ranked: tuple[Outcome, ...] = ("failed", "inconclusive", "passed")
    return next(outcome for outcome in ranked if outcome in found)


@dataclass(frozen=True)
class Verdict:
    """What the battery decides.

    Attributes:
        decision: ``pass``, ``fail``, ``inconclusive`` (it could not have told) or ``void`` (it did not tell, where
            the answer was known). Only ``pass`` is one; all others call for the fallback.
        reason: One line; for a failure it names the first check that failed.
        deciding_check: That check, or the control or figure that decided; empty for a pass.
        full_auc: AUC of the attack on the model before removal.
        checks: All of them, in the order in which they were made.
        controls: The outcome of each control.
        by_attacks: Where bytes decide, what the attacks alone would have decided.
    """

    decision: Decision
    reason: str
    deciding_check: str
    full_auc: float
    checks: tuple[Check, ...]
    controls: dict[str, Outcome]
    by_attacks: Decision | None = None


def by_bytes(same: Check, attacked: Verdict) -> Verdict:
    """The verdict on an exact method: a model with the bytes of a retrained one is one, whatever attacks say.

    Args:
        same: The check of :func:`identity` with a model retrained from the same seed.
        attacked: What the attacks say; reported beside.
    """
    said = f"by the attacks alone: {attacked.decision}, {attacked.reason}"
    passed = same.outcome == "passed"
    reason = (
        f"the same bytes as a model retrained from the same seed ({said})"
        if passed
        else f"{same.measured:.0f} arrays differ from a model retrained from the same seed ({said})"
    )
    return replace(
        attacked,
        decision="pass" if passed else "fail",
        reason=reason,
        deciding_check="" if passed else same.name,
        checks=(same, *attacked.checks),
        by_attacks=attacked.decision,
    )


def judge(
    checks: Sequence[Check],
    *,
    full_auc: float,
    controls: Mapping[str, Sequence[Check]],
    powerless: str = "",
) -> Verdict:
    """Decide, in this order: could the battery tell, did it tell the controls, what does it tell.

    A pass is possible only if every check passes and every control fails.

    Args:
        checks: Of the unlearned model.
        full_auc: AUC of the attack on the model before removal; at least 0.7, or nothing can be concluded.
        controls: The same checks of each of the negative controls.
        powerless: Why the attacks cannot tell anything, or empty.

    Raises:
        ConfigError: A control is missing, there are no checks, a control was put to other checks, or the AUC is not
            in [0, 1].
    """
    outcome = outcome_of(checks)
    names = [check.name for check in checks]
    if not 0 <= full_auc <= 1:
        raise ConfigError(f"verdict: expected the full model's AUC in [0, 1], got {full_auc}")
    if set(controls) != set(CONTROLS):
        raise ConfigError(
            f"verdict: expected the controls {', '.join(CONTROLS)}, got {', '.join(controls) or 'none'}"
        )
    for control, tried in controls.items():
        if [check.name for check in tried] != names:
            raise ConfigError(
                f"verdict: control {control}: expected the checks {names}, got {[c.name for c in tried]}"
            )
    judged = {name: outcome_of(controls[name]) for name in CONTROLS}

    def decided(decision: Decision, reason: str, check: str = "") -> Verdict:
        return Verdict(decision, reason, check, full_auc, tuple(checks), judged)

    if powerless:
        return decided("inconclusive", powerless, "full_auc")
    if full_auc < ATTACKABLE:
        text = (
            f"the full model's AUC is {full_auc:.3f}, below {ATTACKABLE}: there was nothing to find"
        )
        return decided("inconclusive", text, "full_auc")
    for control, result in judged.items():
        if result == "passed":
            return decided(
                "void", f"the control {control} passed, which has forgotten nothing", control
            )
    first = next((check for check in checks if check.outcome == outcome), checks[0])
    if outcome != "passed":
        text = (
            f"{first.name} is {first.measured:.4g}, {first.difference.value:+.4g} from retrained models "
            f"(interval {first.difference.low:+.4g} to {first.difference.high:+.4g}, margin {first.margin:.4g})"
        )
        return decided("fail" if outcome == "failed" else "inconclusive", text, first.name)
    for control, result in judged.items():
        if result == "inconclusive":
            text = f"the control {control} could not be told from retrained models"
            return decided("inconclusive", text, control)
    return decided("pass", f"{len(checks)} checks passed and {len(judged)} controls failed")
