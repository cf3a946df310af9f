from fractions import Fraction

import numpy as np
import pytest

from fedllm_flwr.cascade import Answer, Price, tier_outcomes
from fedllm_flwr.errors import ConfigError, ShapeError


def answers(*rows: str, **more: float) -> list[list[Answer]]:
    """Rows such as ``aab``; "a" is right, "-" could not be parsed."""
    return [
        [
            Answer(f"q{q}", "t", f"m{m}", None if c == "-" else c, c == "a", 10, m + 1, **more)
            for m, c in enumerate(row)
        ]
        for q, row in enumerate(rows)
    ]


def test_a_tier_by_hand() -> None:
    found = tier_outcomes(answers("aab", "bba", "---", "-a-"), Price(Fraction(1), Fraction(2)))
    np.testing.assert_allclose(found.level, [2 / 3, 2 / 3, 0, 1 / 3])
    assert found.parsed.tolist() == [True, True, False, True]
    assert found.correct.tolist() == [True, False, False, True]
    assert found.input_tokens.tolist() == [30] * 4
    assert found.output_tokens.tolist() == [6] * 4, "of all members, whoever wins"
    assert found.cost.tolist() == [42] * 4
    assert found.accepts(2 / 3).tolist() == [True, True, False, False]
    assert found.accepts(0.0).tolist() == [True, True, False, True]
    assert found.serial_seconds is None


def test_scores_take_the_place_of_votes() -> None:
    found = tier_outcomes(answers("aab", score=0.6), Price(), "score")
    np.testing.assert_allclose(found.level, [0.4])
    with pytest.raises(ConfigError, match="query q0, tier t: expected scores, got none"):
        tier_outcomes(answers("aab"), Price(), "score")


def test_members_take_turns_or_run_at_once() -> None:
    rows = [
        [Answer("q", "t", f"m{m}", "a", True, 1, 1, seconds=s) for m, s in enumerate((1.0, 3.0))]
    ]
    found = tier_outcomes(rows, Price())
    assert (found.serial_seconds, found.parallel_seconds) == ([4.0], [3.0])
    rows[0][1] = Answer("q", "t", "m1", "a", True, 1, 1)
    with pytest.raises(
        ConfigError, match="tier t: expected seconds of all calls or of none, got 1 of 2"
    ):
        tier_outcomes(rows, Price())


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ShapeError, match="expected answers to at least one query"):
        tier_outcomes([], Price())
    with pytest.raises(ShapeError, match="tier t: expected 3 answers to each query, got 2"):
        tier_outcomes(answers("aab", "aa"), Price())
    odd = [[Answer("q", "t", m, "a", m == "x", 1, 1) for m in "xy"]]
    with pytest.raises(
        ConfigError, match="query q, tier t: answer 'a': expected the same correctness"
    ):
        tier_outcomes(odd, Price())
