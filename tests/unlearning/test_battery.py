"""Models made of numbers: members and others by difficulty that models share, by seed, and by what a model knows."""

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import logit_confidence
from fedllm_flwr.unlearning.battery import (
    DISTANCE,
    EXPOSURE,
    EXTRACTED,
    LIRA,
    LOSS,
    MEAN_UTILITY,
    MIN_K,
    PAIRED,
    PROBED,
    RELEARNING,
    REWORDED,
    WORST_UTILITY,
    Battery,
    Model,
    Shadows,
    why_powerless,
)
from fedllm_flwr.unlearning.verdict import outcome_of

ROWS, STEPS, CANARIES = 200, (0, 1, 5), 4


def model(seed, knows=0.0, *, utility=0.0, canaries=True, inside=None):
    """A model that has learned its members by so much; ``inside`` says which rows a shadow model was trained on."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    difficulty = shared.standard_normal((2, ROWS))
    learned = np.array([knows, 0.0])[:, None] if inside is None else knows * inside.reshape(2, ROWS)
    losses = np.exp(0.5 * (difficulty + 0.2 * own.standard_normal((2, ROWS)) - learned))
    said = {"members/losses": losses[0], "others/losses": losses[1]}
    said |= {"members/min_k": -losses[0], "others/min_k": -losses[1]}
    said |= {"upper/members": losses[0][:50], "upper/others": losses[1][:50]}
    said |= {"paired/members": losses[0][:40], "paired/others": losses[1][:40]}
    said |= {f"probes/{form}": losses[0][:30] for form in ("pair", "choice")}
    said["relearn"] = 0.3 + 0.2 * knows + 0.01 * own.standard_normal(3)
    if canaries:
        said["canaries/losses"] = 2.0 - knows + 0.05 * own.standard_normal(CANARIES)
        said["canaries/candidates"] = 2.0 + 0.5 * shared.standard_normal((CANARIES, 200))
        said["canaries/exact"] = np.full(CANARIES, knows > 1.0)
    quality = {c: 0.8 - utility + 0.005 * own.standard_normal() for c in range(3)}
    return Model(said, quality)


def shadows(knows=2.0, count=8):
    inside = []
    for pair in range(count // 2):
        half = np.random.default_rng(1000 + pair).permutation(2 * ROWS) < ROWS
        inside += [half, ~half]
    said = [model(500 + n, knows, inside=half).said for n, half in enumerate(inside)]
    losses = [np.concatenate([s["members/losses"], s["others/losses"]]) for s in said]
    return Shadows(logit_confidence(np.stack(losses)), np.stack(inside))


def battery(full=2.0, *, with_shadows=True, retrains=5, canaries=True, **settings):
    return Battery(
        model(1, full, canaries=canaries),
        [model(10 + n, canaries=canaries) for n in range(retrains)],
        shadows() if with_shadows else None,
        start={0: 0.2, 1: 0.3, 2: 0.25},
        relearn_steps=STEPS,
        share=1 / 3,
        **settings,
    )


def test_every_check_tells_a_model_that_knows_all_and_passes_one_that_knows_nothing():
    made = battery()
    checks = made.checks(model(30))
    assert [c.name for c in checks] == [LOSS, MIN_K, LIRA, REWORDED, PAIRED, PROBED, DISTANCE, RELEARNING, EXPOSURE,
                                        EXTRACTED, MEAN_UTILITY, WORST_UTILITY]  # fmt: skip
    assert {c.name: c.outcome for c in checks} == {c.name: "passed" for c in checks}
    assert made.left_out == {}
    told = {c.name: c.outcome for c in made.checks(model(1, 2.0))}
    assert {n for n, outcome in told.items() if outcome != "failed"} == {
        MEAN_UTILITY,
        WORST_UTILITY,
    }
    assert made.full_auc > 0.9
    assert why_powerless(made) == ""


def test_a_model_that_knows_half_or_shuns_the_members_fails():
    made = battery()
    assert outcome_of(made.checks(model(30, 1.0))) == "failed"
    assert outcome_of(made.checks(model(30, -1.5))) == "failed"


def test_damage_to_the_others_fails_and_a_gain_does_not():
    """The start has 0.25 and retrained models 0.8: a third of 0.55 is the margin."""
    made = battery()
    utility = {c.name: c for c in made.checks(model(30, utility=0.3))}
    assert utility[MEAN_UTILITY].outcome == utility[WORST_UTILITY].outcome == "failed"
    assert utility[MEAN_UTILITY].margin == pytest.approx(0.55 / 3, abs=0.01)
    assert utility[WORST_UTILITY].margin == pytest.approx(0.6 / 3, abs=0.01)
    assert outcome_of(made.checks(model(30, utility=-0.15))) == "passed"


def test_the_margin_is_at_least_the_stated_one_and_is_the_full_models():
    by_name = {c.name: c for c in battery().checks(model(30))}
    full = {c.name: c for c in battery().checks(model(1, 2.0))}
    leak = full[LOSS].measured - np.mean(full[LOSS].null)
    assert by_name[LOSS].margin == pytest.approx(leak / 3)
    close = {c.name: c for c in battery(0.3).checks(model(30))}
    assert close[LOSS].margin == 0.05


def test_what_cannot_be_asked_is_left_out_with_its_reason():
    made = battery(with_shadows=False, canaries=False)
    assert LIRA in made.left_out
    assert "shadows=0" in made.left_out[LIRA]
    assert made.left_out[EXPOSURE] == made.left_out[EXTRACTED] == "the client has no canaries"
    bare = {
        n: v
        for n, v in model(1, 2.0).said.items()
        if n.startswith(("members/l", "others/l", "rel"))
    }
    few = [
        Model({n: m.said[n] for n in bare}, m.utility) for m in (model(n) for n in range(10, 15))
    ]
    made = Battery(
        Model(bare, model(1).utility), few, None, start={}, relearn_steps=STEPS, share=0.3
    )
    assert {MIN_K, REWORDED, PAIRED, PROBED} <= set(made.left_out)
    assert [c.name for c in made.checks(few[0])] == [
        LOSS,
        DISTANCE,
        RELEARNING,
        MEAN_UTILITY,
        WORST_UTILITY,
    ]


def test_without_test_rows_of_those_who_stay_there_is_no_utility():
    def blind(knows, *seeds):
        return [Model(model(seed, knows).said, {}) for seed in seeds]

    [full], retrained = blind(2.0, 1), blind(0.0, *range(10, 15))
    made = Battery(full, retrained, None, start={}, relearn_steps=STEPS, share=0.3)
    assert made.left_out[WORST_UTILITY] == "no client that stays has test rows"
    assert MEAN_UTILITY not in [c.name for c in made.checks(retrained[0])]


def test_a_full_model_that_never_remembered_leaves_nothing_to_check():
    made = battery(0.0)
    assert made.attacks_that_tell == ()
    assert "no attack tells the full model" in why_powerless(made)
    assert "it does not tell the full model" in made.left_out[LOSS]
    weak = battery(0.3, with_shadows=False)
    assert weak.attacks_that_tell
    assert "below 0.7" in why_powerless(weak)


def test_attacks_are_reported_with_intervals():
    made = battery()
    lines = made.attacks("half", model(1, 0.5), np.random.default_rng(0), 100)
    assert [line["attack"] for line in lines] == [LOSS, MIN_K, LIRA]
    for line in lines:
        auc = line["result"].auc
        assert 0.5 < auc.low < auc.value < auc.high < 1
    assert lines[0]["result"].members == ROWS


def test_three_retrained_models_at_least():
    with pytest.raises(ConfigError, match="at least 3 retrained models"):
        battery(retrains=2)
