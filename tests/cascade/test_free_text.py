from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.cascade import ROUGE_L, Price
from fedllm_flwr.cascade.free_text import Written, alone, free_text_rows, graded
from fedllm_flwr.errors import ConfigError

PRICES = {"small": Price(Fraction(1, 10), Fraction(1, 10)), "large": Price()}


def written(text: str | None, quality: float, score: float | None = 0.5) -> Written:
    return Written(text, quality, 20, 5, score)


def chain(queries: int = 40, scored: bool = True) -> dict[str, Any]:
    """Members write the same where they are good; the last tier is good everywhere; scores say nothing."""
    random = np.random.default_rng(0)
    small, large = [], []
    for query in range(queries):
        easy = query % 4 > 0
        score = float(random.random()) if scored else None
        texts = (
            ["the council meets", "the council meets", "council meets"]
            if easy
            else ["a b", "c d", "e f"]
        )
        small.append([written(text, 0.8 if easy else 0.1, score) for text in texts])
        large.append([written("the council meets on monday", 0.9, score)])
    return {"small": small, "large": large}


def only(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("method") == method]


def test_similar_texts_are_kept_and_others_deferred() -> None:
    rows = free_text_rows(chain(), PRICES, ROUGE_L)
    strict = only(rows, "semantic")[-1]
    assert strict["deferral_rate"] == 0.25
    assert strict["quality"] == pytest.approx(0.75 * 0.8 + 0.25 * 0.9)
    assert strict["quality_low"] < strict["quality"] < strict["quality_high"]
    gains = {row["signal"]: row for row in rows if row["table"] == "signals"}
    semantic, scores = gains["semantic rouge_l"], gains["log_probability"]
    assert semantic["deferral_gain"] == pytest.approx(1.0)
    assert scores["gain_low"] < 0 < scores["gain_high"], "random scores are worth nothing"
    assert len([row for row in rows if row["table"] == "contradictions"]) == 3


def test_every_line_pays_for_what_it_called() -> None:
    rows = free_text_rows(chain(), PRICES, ROUGE_L)
    (first,), (last,), (one,) = (
        only(rows, m) for m in ("always_first", "always_last", "one_member")
    )
    assert first["cost"] == pytest.approx(40 * 3 * 25 / 10)
    assert (last["cost"], one["cost"]) == (40 * 25, pytest.approx(40 * 25 / 10))
    for row in only(rows, "semantic"):
        assert row["cost"] == pytest.approx(first["cost"] + row["deferral_rate"] * last["cost"])
        assert row["cost_per_query_ratio"] == pytest.approx(0.3 + row["deferral_rate"])
    rates = [row["deferral_rate"] for row in only(rows, "semantic")]
    for method in ("random", "log_probability"):
        assert [row["deferral_rate"] for row in only(rows, method)] == rates
    curve = [row for row in rows if row["table"] == "curve"]
    assert len({tuple(row) for row in curve}) == 1


def test_without_scores_there_is_no_line_of_one_member() -> None:
    rows = free_text_rows(chain(scored=False), PRICES, ROUGE_L)
    assert not only(rows, "log_probability")
    assert not only(rows, "one_member")
    assert [row["signal"] for row in rows if row["table"] == "signals"] == ["semantic rouge_l"]


def test_a_tier_answers_with_its_medoid() -> None:
    answers = [[written("x y", 0.1), written("a b c", 0.7), written("a b c d", 0.5)],
               [written(None, 0.0), written(None, 0.0), written(None, 0.0)]]  # fmt: skip
    tier = graded("small", answers, Price(), ROUGE_L)
    assert tier.correct.tolist() == [0.7, 0.0]
    assert tier.parsed.tolist() == [True, False]
    assert tier.level[1] == 0.0
    single = alone("small", answers, Price())
    assert single is not None
    assert single.correct.tolist() == [0.1, 0.0]


def test_one_member_cannot_agree() -> None:
    answers = chain()
    with pytest.raises(
        ConfigError, match="the first with two members or more, got large of 1, small of 3"
    ):
        free_text_rows({"large": answers["large"], "small": answers["small"]}, PRICES, ROUGE_L)
