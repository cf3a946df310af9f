import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import auc
from fedllm_flwr.unlearning.budget import MARGIN
from fedllm_flwr.unlearning.verdict import (
    CONTROLS,
    by_bytes,
    equivalence,
    false_alarm_rate,
    identity,
    judge,
    outcome_of,
    stated_margin,
    tells,
)

NULL = (0.50, 0.51, 0.52)
EXAMPLES, RETRAINS = 300, 8


def check(outcome, name="auc"):
    measured = {"passed": 0.51, "failed": 0.9, "inconclusive": 0.55}[outcome]
    made = equivalence(name, measured, NULL)
    assert made.outcome == outcome
    return made


def controls(outcome="failed", **others):
    return {name: [check(others.get(name, outcome))] for name in CONTROLS}


def test_the_interval_by_hand():
    """s = 0.01, and t(2) at 95 % is 2.920: the half-width is 2.920 · 0.01 / √3; one more would be within it · 2."""
    half = 2.91999 * 0.01 / math.sqrt(3)
    found = equivalence("auc", 0.52, NULL)
    assert found.difference.value == pytest.approx(0.01)
    assert found.difference.high - found.difference.value == pytest.approx(half, rel=1e-4)
    assert found.difference.value - found.difference.low == pytest.approx(half, rel=1e-4)
    assert found.outcome == "passed"
    assert equivalence("auc", 0.54, NULL).outcome == "passed"
    assert equivalence("auc", 0.545, NULL).outcome == "inconclusive"
    assert equivalence("auc", 0.57, NULL).outcome == "failed"
    assert equivalence("auc", 0.45, NULL).outcome == "failed"


def test_forgetting_too_much_fails_too_and_one_sided_checks_look_one_way():
    assert equivalence("auc", 0.3, NULL).outcome == "failed"
    assert equivalence("auc", 0.3, NULL, side="above").outcome == "passed"
    assert equivalence("auc", 0.7, NULL, side="above").outcome == "failed"
    assert equivalence("accuracy", 0.7, NULL, side="below").outcome == "passed"
    assert equivalence("accuracy", 0.3, NULL, side="below").outcome == "failed"


def test_retrained_models_that_scatter_prove_nothing():
    """t(2) s √(4/3) is 0.337: a difference of 0.3 may be the seed's, one of 0.4 is not."""
    wide = (0.4, 0.5, 0.6)
    assert equivalence("auc", 0.5, wide).outcome == "inconclusive"
    assert equivalence("auc", 0.8, wide).outcome == "inconclusive"
    assert equivalence("auc", 0.9, wide).outcome == "failed"


def test_retrained_models_that_agree_leave_the_margin_alone():
    same = (0.0, 0.0, 0.0)
    assert equivalence("secrets", 0.0, same, margin=0).outcome == "passed"
    assert equivalence("secrets", 1.0, same, margin=0).outcome == "failed"


numbers = st.floats(-5, 5)


@given(numbers, st.lists(numbers, min_size=3, max_size=6), st.floats(0, 2), numbers)
def test_a_check_does_not_depend_on_where_zero_is(measured, null, margin, shift):
    first = equivalence("x", measured, null, margin=margin)
    mirrored = equivalence("x", -measured, [-value for value in null], margin=margin)
    assert mirrored.outcome == first.outcome
    assert mirrored.difference.value == -first.difference.value
    moved = equivalence("x", measured + shift, [value + shift for value in null], margin=margin)
    assert moved.difference.value == pytest.approx(first.difference.value, abs=1e-9)
    assert moved.difference.low == pytest.approx(first.difference.low, abs=1e-9)


def test_a_wrong_model_at_the_margin_passes_one_time_in_twenty_at_most():
    """The level of the two one-sided tests, over 4000 draws: 5 % and 3 standard errors."""
    rng = np.random.default_rng(0)
    for spread in (0.005, 0.01, 0.02):
        passed = sum(
            equivalence("auc", 0.55, 0.5 + rng.normal(0, spread, RETRAINS)).outcome == "passed"
            for _ in range(1000)
        )
        assert passed / 1000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize(
    ("share", "retrains", "stated"),
    [(3, 3, 0.27), (3, 5, 0.066), (3, 8, 0.029), (4, 3, 0.078), (4, 5, 0.007), (4, 8, 0.002)],
)
def test_the_false_alarm_rates_that_are_stated(share, retrains, stated):
    """Against 3000 simulated null models, to 4 standard errors."""
    rng, spread = np.random.default_rng(0), MARGIN / share
    rate = false_alarm_rate(spread, retrains)
    assert rate == pytest.approx(stated, abs=0.0051)
    draws = rng.normal(0, spread, (3000, retrains + 1))
    missed = sum(equivalence("auc", row[0], row[1:].tolist()).outcome != "passed" for row in draws)
    assert missed / 3000 == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / 3000))


def test_the_margin_is_a_share_of_what_the_full_model_gives_away():
    assert stated_margin(0.91, NULL, share=0.25, least=0.05) == pytest.approx(0.1)
    assert stated_margin(0.11, NULL, share=0.25, least=0.05) == pytest.approx(0.1)
    assert stated_margin(0.53, NULL, share=0.25, least=0.05) == 0.05
    for wrong in ({"share": 1.0, "least": 0.05}, {"share": 0.5, "least": -1.0}):
        with pytest.raises(ConfigError, match="margin: expected retrained models"):
            stated_margin(0.9, NULL, **wrong)
    with pytest.raises(ConfigError, match="margin: expected retrained models"):
        stated_margin(0.9, (), share=0.5, least=0.05)


def test_a_check_that_does_not_find_the_full_model_finds_nothing():
    assert tells(check("failed"))
    assert not tells(check("inconclusive"))
    assert not tells(check("passed"))


def test_false_alarms_at_both_ends():
    assert false_alarm_rate(0.0, 3) == 0
    assert false_alarm_rate(1.0, 3) == pytest.approx(1, abs=0.01)
    for wrong in ((-1, 3), (0.1, 2)):
        with pytest.raises(ConfigError, match="false alarms: expected a spread"):
            false_alarm_rate(*wrong)


def world(seed):
    """Scores of 300 members and others by difficulty, which models share, and by seed; some of membership.

    Returns a function from what a model still knows to the two checks of it, and its AUC.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.standard_normal((2, EXAMPLES))

    def figures(knows):
        scores = difficulty + 0.5 * rng.standard_normal((2, EXAMPLES))
        scores[0] += knows
        return float(auc(scores[0], scores[1])), float(scores.mean())

    null = [figures(0.0) for _ in range(RETRAINS)]

    def checks(knows):
        area, loss = figures(knows)
        made = [
            equivalence("auc", area, [n[0] for n in null]),
            equivalence("loss in nats", loss, [n[1] for n in null], margin=0.15),
        ]
        return made, area

    return checks


CONTROL_KNOWS = {
    "no_op": 1.2,
    "gradient_ascent": -3.0,
    "refusal_wrapper": 1.0,
    "adapter_noise": 0.8,
}


def decided(seed, knows):
    checks = world(seed)
    made, _ = checks(knows)
    tried = {name: checks(level)[0] for name, level in CONTROL_KNOWS.items()}
    return judge(made, full_auc=checks(1.2)[1], controls=tried).decision


def test_retrained_models_pass_in_nineteen_of_twenty_seeds():
    decisions = [decided(seed, 0.0) for seed in range(20)]
    assert decisions.count("pass") >= 19
    assert decisions.count("fail") + decisions.count("void") == 0


def test_over_many_seeds_nineteen_of_twenty_retrained_models_pass():
    passed = sum(decided(seed, 0.0) == "pass" for seed in range(100, 300))
    assert passed / 200 >= 0.95


@pytest.mark.parametrize("knows", [1.2, 0.8, 0.5, -0.6])
def test_models_that_know_or_shun_the_members_fail(knows):
    decisions = [decided(seed, knows) for seed in range(20)]
    assert decisions.count("pass") == 0
    assert decisions.count("fail") >= 18


def test_a_pass_needs_every_check_and_every_control():
    verdict = judge(
        [
            check("passed"),
        ],
        full_auc=0.8,
        controls=controls(),
    )
    assert verdict.decision == "pass"
    assert verdict.deciding_check == ""
    assert verdict.reason == "1 checks passed and 4 controls failed"
    assert verdict.controls == dict.fromkeys(CONTROLS, "failed")


def test_the_first_check_that_failed_is_named():
    names = ("a", "b", "c", "d")
    made = [
        check(o, n)
        for o, n in zip(("passed", "inconclusive", "failed", "failed"), names, strict=True)
    ]
    tried = {control: [check("failed", n) for n in names] for control in CONTROLS}
    verdict = judge(made, full_auc=0.7, controls=tried)
    assert (verdict.decision, verdict.deciding_check) == ("fail", "c")
    assert verdict.reason == (
        "c is 0.9, +0.39 from retrained models (interval +0.3731 to +0.4069, margin 0.05)"
    )
    verdict = judge(made[:2], full_auc=0.7, controls={c: t[:2] for c, t in tried.items()})
    assert (verdict.decision, verdict.deciding_check) == ("inconclusive", "b")


def test_a_model_that_never_remembered_proves_nothing():
    for outcome in ("passed", "failed"):
        verdict = judge([check(outcome)], full_auc=0.69, controls=controls("passed"))
        assert (verdict.decision, verdict.deciding_check) == ("inconclusive", "full_auc")
        assert "AUC is 0.690, below 0.7" in verdict.reason


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_a_control_that_passes_makes_the_battery_void(control, outcome):
    verdict = judge([check(outcome)], full_auc=0.9, controls=controls(**{control: "passed"}))
    assert (verdict.decision, verdict.deciding_check) == ("void", control)


def test_a_control_that_cannot_be_told_leaves_no_pass():
    uncertain = controls(adapter_noise="inconclusive")
    verdict = judge([check("passed")], full_auc=0.9, controls=uncertain)
    assert (verdict.decision, verdict.deciding_check) == ("inconclusive", "adapter_noise")
    assert judge([check("failed")], full_auc=0.9, controls=uncertain).decision == "fail"


def test_bytes_are_equal_or_not():
    assert identity("bytes", ()).outcome == "passed"
    found = identity("bytes", ("a", "b"))
    assert (found.outcome, found.measured) == ("failed", 2)
    assert outcome_of([identity("bytes", ()), check("inconclusive")]) == "inconclusive"


def test_bytes_decide_over_an_exact_method_and_what_attacks_say_stands_beside():
    attacked = judge([check("inconclusive")], full_auc=0.9, controls=controls())
    same = by_bytes(identity("bytes", ()), attacked)
    assert (same.decision, same.by_attacks, same.deciding_check) == ("pass", "inconclusive", "")
    assert [c.name for c in same.checks] == ["bytes", "auc"]
    attacked = judge([check("passed")], full_auc=0.9, controls=controls())
    other = by_bytes(identity("bytes", ("lora_b",)), attacked)
    assert (other.decision, other.by_attacks, other.deciding_check) == ("fail", "pass", "bytes")
    assert other.reason.startswith("1 arrays differ from a model retrained from the same seed")


def test_attacks_without_power_conclude_nothing():
    verdict = judge([check("passed")], full_auc=0.9, controls=controls(), powerless="no attack tells")  # fmt: skip
    assert (verdict.decision, verdict.reason) == ("inconclusive", "no attack tells")


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="at least 3 retrained models"):
        equivalence("auc", 0.5, NULL[:2])
    with pytest.raises(ConfigError, match="expected finite figures"):
        equivalence("auc", math.nan, NULL)
    for wrong in ({"margin": -1}, {"alpha": 0.5}, {"side": "left"}):
        with pytest.raises(ConfigError, match="check auc: expected a margin"):
            equivalence("auc", 0.5, NULL, **wrong)
    with pytest.raises(ConfigError, match="at least one check"):
        judge([], full_auc=0.8, controls=controls())
    with pytest.raises(ConfigError, match=r"expected the controls no_op, .*, got no_op"):
        judge([check("passed")], full_auc=0.8, controls={"no_op": [check("failed")]})
    with pytest.raises(
        ConfigError, match=r"control no_op: expected the checks \['ks'\], got \['auc'\]"
    ):
        judge([check("passed", "ks")], full_auc=0.8, controls=controls())
    with pytest.raises(ConfigError, match=r"AUC in \[0, 1\], got 1.1"):
        judge([check("passed")], full_auc=1.1, controls=controls())


def test_students_quantile_is_the_one_that_was_meant():
    assert student.ppf(0.95, 2) == pytest.approx(2.91999, abs=1e-4)
