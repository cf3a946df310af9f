"""Replays of small files whose every figure is worked out on paper, in the comments, without the package's code."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import actions
from fedllm_flwr.cascade import TOKENS, recording, replay
from fedllm_flwr.compose import compose_run

Fixture = Callable[..., Any]
Rows = list[dict[str, Any]]


def line(
    query: str,
    tier: str | int,
    member: str | int,
    answer: Any,
    correct: bool,
    read: int,
    wrote: int,
) -> dict[str, Any]:
    return {"query": query, "tier": tier, "member": member, "answer": answer, "correct": correct,
            "input_tokens": read, "output_tokens": wrote}  # fmt: skip


# Two members before one. Small reads 10 + 20 and writes 1 + 2 tokens a query (33), nothing where it says nothing (30).
# Large reads 100 and writes 5 (105), nothing where it says nothing (100).
#
#      small a, b       majority, level      large
# q1   yes, Yes         yes    1    right    right
# q2   no, yes          no     1/2  wrong    right    a tie: the first member's answer
# q3   null, ""         none   0    wrong    right    two that are unparsed do not agree
# q4   null, dog        dog    1/2  right    wrong
# q5   x, x             x      1    wrong    none, wrong
PAIR = [
    line("q1", "small", "a", "yes", True, 10, 1), line("q1", "small", "b", "Yes", True, 20, 2),
    line("q2", "small", "a", "no", False, 10, 1), line("q2", "small", "b", "yes", True, 20, 2),
    line("q3", "small", "a", None, False, 10, 0), line("q3", "small", "b", "", False, 20, 0),
    line("q4", "small", "a", None, False, 10, 1), line("q4", "small", "b", "dog", True, 20, 2),
    line("q5", "small", "a", "x", False, 10, 1), line("q5", "small", "b", "x", False, 20, 2),
    line("q1", "large", "L", "yes", True, 100, 5), line("q2", "large", "L", "yes", True, 100, 5),
    line("q3", "large", "L", "cat", True, 100, 5), line("q4", "large", "L", "fox", False, 100, 5),
    line("q5", "large", "L", None, False, 100, 0),
]  # fmt: skip

# One member a tier, so every parsed answer has level 1; tiers are numbers, and the last one stands first in the file.
#
#      1 (1 + 1 = 2)   2 (10 + 1 = 11)   3 (100 + 1 = 101)
# q1   a right         a right           a right
# q2   none            b right           b right
# q3   none            none              c right
# q4   z wrong         d right           none
SINGLE = [
    line(query, tier, "m", answer, right, read, 1)
    for tier, read, said in (
        (3, 100, ("a", "b", "c", None)),
        (1, 1, ("a", None, None, "z")),
        (2, 10, ("a", "b", " ", "d")),
    )
    for query, answer, right in zip(
        ("q1", "q2", "q3", "q4"), said, (s in ("a", "b", "c", "d") for s in said), strict=True
    )
]


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Rows]:
    """What the command prints for a file, read by a JSON parser: so standard output holds nothing else."""

    def done(lines: Rows, *more: str) -> Rows:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        words = ["action=cascade", f"replay={path}", "format=json", *more]
        capsys.readouterr()
        assert actions.act(compose_run(words), words) == 0
        out, err = capsys.readouterr()
        assert err == ""
        found: Rows = json.loads(out)
        return found

    return done


def figures(rows: Rows, method: str, theta: float | None, *names: str) -> tuple[Any, ...]:
    [row] = [r for r in rows if r.get("method") == method and r["theta"] == theta]
    return tuple(row[name] for name in names)


def thetas(rows: Rows) -> list[float]:
    return [row["theta"] for row in rows if row.get("method") == "cascade"]


def test_a_pair_before_one(printed: Fixture) -> None:
    rows = printed(PAIR)
    assert thetas(rows) == [0.5, 1.0]
    names = ("correct", "accuracy", "deferral_rate", "cost", "cost_per_query")
    # All of small: 33 + 33 + 30 + 33 + 33 = 162. All of large: 4 * 105 + 100 = 520.
    # 1/2: q3 is deferred and becomes right: q1, q3, q4; 162 + 105.
    assert figures(rows, "cascade", 0.5, *names) == (3, 0.6, 0.2, 267, 53.4)
    # 1: q2, q3, q4 are deferred: q1, q2, q3 are right; 162 + 315.
    assert figures(rows, "cascade", 1.0, *names) == (3, 0.6, 0.6, 477, 95.4)
    assert figures(rows, "always_first", None, *names) == (2, 0.4, 0.0, 162, 32.4)
    assert figures(rows, "always_last", None, *names) == (3, 0.6, 1.0, 520, 104)
    # q1 33 and q4 33 to small; q2 105, q3 105 and, right nowhere, q5 100 to large.
    assert figures(rows, "oracle", None, *names) == (4, 0.8, 0.6, 376, 75.2)
    # Blindly: 0.8 * 2/5 + 0.2 * 3/5 at 32.4 + 0.2 * 104; 0.4 * 2/5 + 0.6 * 3/5 at 32.4 + 0.6 * 104.
    for theta, wanted in ((0.5, (0.44, 53.2)), (1.0, (0.52, 94.8))):
        found = figures(rows, "random", theta, "accuracy", "cost_per_query")
        assert found == pytest.approx(wanted)
    # Two at once count as one: (162/2 + 105) / 5 and (162/2 + 315) / 5.
    assert figures(rows, "cascade", 0.5, "parallel_cost_per_query") == (37.2,)
    assert figures(rows, "cascade", 1.0, "parallel_cost_per_query") == (79.2,)


def test_each_tiers_traffic_and_tokens(printed: Fixture) -> None:
    (small, large), = figures(printed(PAIR), "cascade", 1.0, "tiers")  # fmt: skip
    assert small == {"tier": "small", "reached": 5, "answered": 2, "deferral_rate": 0.6, "cost": 162,
                     "input_tokens": 150, "output_tokens": 12}  # fmt: skip
    assert large == {"tier": "large", "reached": 3, "answered": 3, "deferral_rate": 0.0, "cost": 315,
                     "input_tokens": 300, "output_tokens": 15}  # fmt: skip
    (small, large), = figures(printed(PAIR), "always_last", None, "tiers")  # fmt: skip
    assert (small["reached"], small["cost"], small["deferral_rate"]) == (0, 0, None)
    assert (large["reached"], large["input_tokens"], large["output_tokens"]) == (5, 500, 20)


def test_prices_count_what_is_read_and_written_apart(printed: Fixture) -> None:
    rows = printed(PAIR, "prices=[small:0.1/0.2,large:1/3]")
    # Small: 150 * 0.1 + 12 * 0.2 = 17.4. Large: 115 a query, 100 for q5.
    wanted = [("always_first", None, 17.4), ("always_last", None, 560), ("cascade", 0.5, 132.4),
              ("cascade", 1.0, 362.4), ("oracle", None, 3.6 + 3.6 + 115 + 115 + 100)]  # fmt: skip
    for method, theta, cost in wanted:
        assert figures(rows, method, theta, "cost") == (cost,)


def test_signals_of_a_pair(printed: Fixture) -> None:
    small, large = [row for row in printed(PAIR) if row["table"] == "signals"]
    assert (small["accuracy"], small["unparsed"], large["accuracy"], large["unparsed"]) == (0.4, 1, 0.6, 1)  # fmt: skip
    # Right answers at 1 and 1/2, wrong ones at 1/2, 0 and 1: won 1, 1, ½ and ½, 1, 0 of six pairs.
    assert small["auroc"] == pytest.approx(4 / 6)
    # Errors by falling level, ties in expectation: ½, 1, 1½, 2, 3 over 1 to 5.
    assert small["aurc"] == pytest.approx((0.5 + 0.5 + 0.5 + 0.5 + 0.6) / 5)
    # Large gains 1, 0, 0, 0, 0 by rising level, 1, 1, 0, 0, −1 at best, 0.2 a query blindly. Areas over random:
    # 0.8 + 0.6 + 0.4 + 0.2 = 2 of 0.8 + 1.6 + 1.4 + 1.2 = 5.
    assert small["deferral_gain"] == pytest.approx(2 / 5)
    # a is right on q1, b on q1, q2, q4: covariance 0.4 of √0.8 √1.2.
    assert small["error_correlation"] == pytest.approx(0.4 / math.sqrt(0.96))
    assert large["deferral_gain"] is None
    assert large["error_correlation"] is None


def test_one_member_a_tier(printed: Fixture) -> None:
    rows = printed(SINGLE)
    assert thetas(rows) == [1.0]
    names = ("correct", "deferral_rate", "cost")
    # q1 and q4 stop at 1, q2 at 2, q3 at 3: 4 * 2 + 2 * 11 + 101.
    assert figures(rows, "cascade", 1.0, *names) == (3, 0.5, 131)
    (tiers,) = figures(rows, "cascade", 1.0, "tiers")
    assert [(t["tier"], t["reached"], t["answered"], t["deferral_rate"], t["cost"]) for t in tiers] == [
        ("1", 4, 2, 0.5, 8), ("2", 2, 1, 0.5, 22), ("3", 1, 1, 0.0, 101),
    ]  # fmt: skip
    assert figures(rows, "always_first", None, *names) == (1, 0.0, 8)
    assert figures(rows, "always_last", None, *names) == (3, 1.0, 404)
    # q1 to 1, q2 and q4 to 2, q3 to 3: 2 + 11 + 11 + 101.
    assert figures(rows, "oracle", None, *names) == (4, 0.75, 125)


@pytest.mark.parametrize(
    ("theta", "correct", "cost"),
    [
        (0.0, 3, 267),  # as 1/2: what is unparsed is deferred even at 0
        (0.5, 3, 267),  # at least θ
        (math.nextafter(0.5, 1), 3, 477),
        (1.0, 3, 477),
        (math.nextafter(1.0, 2), 3, 682),  # all deferred, and small is paid too: 162 + 520
        (math.inf, 3, 682),
    ],
)
def test_a_threshold_at_and_beside_a_level(theta: float, correct: int, cost: int) -> None:
    read = recording(list(enumerate(PAIR, start=1)), "answers.jsonl")
    rows = replay(read, dict.fromkeys(read.tiers, TOKENS), thetas=[theta])
    assert figures(rows, "calibrated", None, "correct", "cost") == (correct, cost)


def test_four_of_five_are_enough_at_four_fifths(printed: Fixture) -> None:
    # Four of five say right, then large (10 tokens) is asked or not; each member takes 2 tokens.
    lines = [line("q", "small", f"m{n}", "no" if n == 4 else "yes", n < 4, 1, 1) for n in range(5)]
    rows = printed([*lines, line("q", "large", "L", "no", False, 9, 1)])
    assert thetas(rows) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures(rows, "cascade", 0.8, "correct", "cost") == (1, 10)
    assert figures(rows, "cascade", 1.0, "correct", "cost") == (0, 20)


def test_clones_agree_and_say_nothing(printed: Fixture) -> None:
    # Three copies, right on q1 and q2 of four: all levels are 1, so no threshold defers.
    small = [line(f"q{q}", "small", f"m{n}", f"a{q}", q < 3, 1, 1) for q in range(1, 5) for n in range(3)]  # fmt: skip
    large = [line(f"q{q}", "large", "L", "x", True, 9, 1) for q in range(1, 5)]
    rows = printed([*small, *large])
    assert thetas(rows) == [1 / 3, 2 / 3, 1.0]
    for theta in thetas(rows):
        assert figures(rows, "cascade", theta, "correct", "deferral_rate", "cost") == (2, 0.0, 24)
    signal = next(row for row in rows if row["table"] == "signals")
    assert (signal["auroc"], signal["deferral_gain"]) == (0.5, 0.0)
    assert signal["error_correlation"] == pytest.approx(1.0)


def test_one_query_is_enough(printed: Fixture) -> None:
    small = [line("q", 0, n, said, True, 1, 1) for n, said in enumerate((18, 18.0))]
    rows = printed([*small, line("q", 1, 0, 18, True, 1, 0)])
    # 18 and 18.0 are one answer, so both members agree: 4 tokens, and large is not asked.
    assert figures(rows, "cascade", 1.0, "correct", "cost") == (1, 4)
    assert figures(rows, "oracle", None, "correct", "cost") == (1, 4)
    assert {row["auroc"] for row in rows if row["table"] == "signals"} == {None}
