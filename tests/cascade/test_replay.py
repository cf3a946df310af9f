from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.cascade import TOKENS, Beside, Price, TierLoad, expected_cost, recording, replay
from fedllm_flwr.cascade.noninferiority import most_lost
from fedllm_flwr.errors import ConfigError

Record = Callable[..., dict[str, Any]]
TIERS = {"small": 3, "middle": 5, "large": 1}
PRICES = {
    "small": Price(Fraction(1, 10), Fraction(1, 10)),
    "middle": Price(Fraction(18, 100), Fraction(3, 10)),
    "large": Price(Fraction(9, 10), Fraction(9, 10)),
}


def simulated(seed: int, queries: int = 60, scores: bool = False) -> list[dict[str, Any]]:
    """Records of three tiers, each better than the last; some answers are empty."""
    rng = np.random.default_rng(seed)
    records = []
    for query in range(queries):
        truth, ease = int(rng.integers(4)), rng.random()
        for place, (tier, members) in enumerate(TIERS.items()):
            for member in range(members):
                known = rng.random() < min(1.0, 0.3 + 0.4 * ease + 0.2 * place)
                said = truth if known else int(rng.integers(4))
                answer = None if rng.random() < 0.05 else f"label {said}"
                found = {
                    "query": f"q{query}", "tier": tier, "member": f"m{member}", "answer": answer,
                    "correct": answer is not None and said == truth,
                    "input_tokens": int(rng.integers(50, 90)), "output_tokens": int(rng.integers(1, 9)),
                }  # fmt: skip
                records.append({**found, "score": float(rng.random())} if scores else found)
    return records


def replayed(
    records: Sequence[dict[str, Any]], prices: dict[str, Price] | None = None
) -> list[dict[str, Any]]:
    read = recording(list(enumerate(records, start=1)), "answers.jsonl")
    return replay(read, prices or dict.fromkeys(read.tiers, TOKENS))


def only(rows: list[dict[str, Any]], method: str, theta: float | None = None) -> dict[str, Any]:
    [row] = [
        r
        for r in rows
        if r["table"] == "curve"
        and r["method"] == method
        and (theta is None or r["theta"] == theta)
    ]
    return row


# What a person does with the file, without any code of the package ------------------------------------------------


def majority(rows: list[dict[str, Any]]) -> tuple[bool, float]:
    """Whether the most frequent answer is right, and its share."""
    said = Counter(row["answer"] for row in rows if row["answer"])
    if not said:
        return rows[0]["correct"], 0.0
    answer, count = said.most_common(1)[0]
    return next(row["correct"] for row in rows if row["answer"] == answer), count / len(rows)


def by_query(records: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in records:
        found[row["query"]][row["tier"]].append(row)
    return found


def tokens(rows: list[dict[str, Any]]) -> int:
    return sum(row["input_tokens"] + row["output_tokens"] for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_lines_equal_what_a_person_computes_from_the_file(seed: int) -> None:
    records = simulated(seed)
    rows, table = replayed(records), by_query(records)
    for method, tier in (("always_first", "small"), ("always_last", "large")):
        found = only(rows, method)
        assert found["correct"] == sum(majority(q[tier])[0] for q in table.values())
        assert found["accuracy"] == found["correct"] / 60
        assert found["cost"] == sum(tokens(q[tier]) for q in table.values())
        assert found["cost_per_query"] == found["cost"] / 60
    right = cost = 0
    for query in table.values():
        chosen = next((tier for tier in TIERS if majority(query[tier])[0]), "large")
        right += majority(query[chosen])[0]
        cost += tokens(query[chosen])
    assert (only(rows, "oracle")["correct"], only(rows, "oracle")["cost"]) == (right, cost)


@pytest.mark.parametrize("seed", range(3))
def test_every_threshold_equals_the_cascade_as_it_is_written_down(seed: int) -> None:
    records = simulated(seed)
    rows, table = replayed(records, PRICES), by_query(records)
    thetas = [
        row["theta"] for row in rows if row["table"] == "curve" and row["method"] == "cascade"
    ]
    assert thetas == sorted({1 / 3, 2 / 3, 1.0, 1 / 5, 2 / 5, 3 / 5, 4 / 5})
    for theta in thetas:
        reached, answered, spent, right = Counter(), Counter(), defaultdict(Fraction), 0
        for query in table.values():
            for tier in TIERS:
                reached[tier] += 1
                for row in query[tier]:
                    price = PRICES[tier]
                    spent[tier] += (
                        price.input * row["input_tokens"] + price.output * row["output_tokens"]
                    )
                correct, share = majority(query[tier])
                if tier == "large" or (share >= theta and share > 0):
                    answered[tier] += 1
                    right += correct
                    break
        found = only(rows, "cascade", theta)
        assert found["correct"] == right
        assert found["cost"] == float(sum(spent.values())), "to the last digit"
        for entry in found["tiers"]:
            tier = entry["tier"]
            assert (entry["reached"], entry["answered"]) == (reached[tier], answered[tier])
            assert entry["cost"] == float(spent[tier])
            deferred = (reached[tier] - answered[tier]) / reached[tier] if reached[tier] else None
            assert entry["deferral_rate"] == deferred
        assert found["deferral_rate"] == (60 - answered["small"]) / 60


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("free", [None, "small", "large"])
def test_no_line_of_a_cascade_is_cheaper_than_its_first_tier(seed: int, free: str | None) -> None:
    prices = {
        tier: Price(Fraction(0), Fraction(0)) if tier == free else own
        for tier, own in PRICES.items()
    }
    rows = replayed(simulated(seed, scores=True), prices)
    first = only(rows, "always_first")
    for row in rows:
        if row.get("method") in ("cascade", "score_cascade", "random"):
            assert row["cost"] >= first["cost"] * (1 - 1e-12)
            assert row["cost"] == pytest.approx(sum(tier["cost"] for tier in row["tiers"]))
            assert row["tiers"][0]["reached"] == row["queries"], "every query pays the first tier"
            assert row["parallel_cost_per_query"] <= row["cost_per_query"]
            assert row["parallel_cost_per_query"] >= first["parallel_cost_per_query"] * (1 - 1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_ratios_are_the_closed_form_where_every_call_reads_the_same(
    record: Record, rho: float
) -> None:
    """k^ρ·γ + p with γ = 1/9, k = 3 and p = 0.3, from counted tokens."""
    records = []
    for query in range(40):
        for place, member in enumerate("abc"):
            said = "y" if query < 12 and place == 2 else "x"
            records.append(record(f"q{query}", "small", member, said, said == "x"))
        records.append(record(f"q{query}", "large", "L", "x", True))
    read = recording(list(enumerate(records, start=1)), "answers.jsonl")
    prices = {"small": Price(), "large": Price(Fraction(9), Fraction(9))}
    rows = replay(read, prices, parallelism={"small": rho})
    row = only(rows, "cascade", 1.0)
    assert row["deferral_rate"] == 0.3
    wanted = {r: expected_cost([TierLoad(1 / 9, 3, r), TierLoad(1.0)], [0.3]) for r in (rho, 1.0)}
    assert row["parallel_cost_per_query_ratio"] == pytest.approx(wanted[rho])
    assert row["cost_per_query_ratio"] == pytest.approx(wanted[1.0]) == pytest.approx(3 / 9 + 0.3)
    alike = np.ones(40, dtype=bool)
    assert row["most_lost"] == most_lost(alike, alike) > 0, (
        "all right, as the last tier, on 40 queries"
    )
    assert only(rows, "always_last")["cost_per_query_ratio"] == 1


def test_what_stands_beside_is_walked_like_the_cascade(record: Record) -> None:
    """Samples that always agree defer nothing; a router that knows all is right wherever a tier is."""
    records, samples, timed = [], [], []
    for query in range(20):
        name, right = f"q{query}", query % 2 == 0
        for member in "ab":
            said = "x" if right or member == "a" else "z"
            records.append(
                record(name, "small", member, "y" if said == "x" and not right else said, right)
            )
        records.append(record(name, "large", "L", "x", True))
        samples += [record(name, "small", f"s{n}", "x" if right else "y", right) for n in range(2)]
        for member in "ab":
            timed.append(
                record(name, "small", member, member if query % 2 else "x", right, seconds=1.0)
            )
        timed.append(record(name, "large", "L", "x", True, seconds=4.0))

    def read(of: list[dict[str, Any]]) -> Any:
        return recording(list(enumerate(of, start=1)), "x")

    promised = np.array([1.0 if query % 2 == 0 else 0.0 for query in range(20)])
    beside = Beside(read(samples), promised, read(timed))
    main = read(records)
    rows = replay(main, dict.fromkeys(main.tiers, TOKENS), thetas=(1.0,), beside=beside)
    cascaded, routed = only(rows, "cascade", 1.0), only(rows, "router", 1.0)
    assert cascaded["deferral_rate"] == routed["deferral_rate"] == 0.5
    assert routed["accuracy"] == 1.0
    assert routed["cost"] == 10 * 22 + 10 * 11 < cascaded["cost"] == 20 * 22 + 10 * 11
    alone = only(rows, "self_consistency_cascade", 1.0)
    assert (alone["deferral_rate"], alone["accuracy"]) == (0.0, 0.5)
    assert only(rows, "self_consistency")["cost"] == 20 * 22
    for method in ("cascade", "calibrated"):
        row = [r for r in rows if r.get("method") == method][-1]
        assert (row["p50_serial_seconds"], row["p99_serial_seconds"]) == (4.0, 6.0)
        assert (row["p50_parallel_seconds"], row["p99_parallel_seconds"]) == (3.0, 5.0)
    assert only(rows, "always_last")["p95_serial_seconds"] == 4.0
    assert routed["p50_serial_seconds"] is None
    assert len({tuple(row) for row in rows if row["table"] == "curve"}) == 1


def test_baselines_defer_as_often_as_the_cascade_that_they_stand_beside() -> None:
    rows = replayed(simulated(5, scores=True))
    for row in [r for r in rows if r.get("method") == "cascade"]:
        for method in ("random", "max_score"):
            beside = only(rows, method, row["theta"])
            assert [t["reached"] for t in beside["tiers"]] == [t["reached"] for t in row["tiers"]]
            assert beside["deferral_rate"] == row["deferral_rate"]
        assert only(rows, "max_score", row["theta"])["cost"] <= row["cost"], "one member a tier"
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["cost_per_query_low"] <= row["cost_per_query"] <= row["cost_per_query_high"]


def test_score_deferral_runs_from_taking_every_answer_to_deferring_most() -> None:
    rows = [r for r in replayed(simulated(6, scores=True)) if r.get("method") == "score_cascade"]
    assert len(rows) == 11
    rates = [row["deferral_rate"] for row in rows]
    assert rates == sorted(rates)
    assert rates[-1] > 0.8
    without = replayed(simulated(6))
    assert {r["method"] for r in without if r["table"] == "curve"} == {
        "cascade", "random", "always_first", "always_last", "oracle",
    }  # fmt: skip


def test_every_row_of_a_table_has_the_same_columns_and_no_value_is_nan() -> None:
    for records in (simulated(7, scores=True), simulated(7)):
        rows = replayed(records)
        for table in ("curve", "signals"):
            assert len({tuple(row) for row in rows if row["table"] == table}) == 1
        assert not [row for row in rows for value in row.values() if value != value]


def test_signals_of_clones_and_of_others(record: Record) -> None:
    records = []
    for query in range(40):
        right = query % 4 > 0
        for member in "abc":
            records.append(record(f"q{query}", "clones", member, "x" if right else "y", right))
        for place, member in enumerate("abc"):
            said = right or query % 3 == place
            records.append(
                record(f"q{query}", "others", member, "x" if said else f"y{member}", said)
            )
        records.append(record(f"q{query}", "last", "z", "x", True))
    clones, others, last = [row for row in replayed(records) if row["table"] == "signals"]
    assert (clones["auroc"], clones["auroc_low"], clones["auroc_high"]) == (0.5, 0.5, 0.5)
    assert clones["error_correlation"] == pytest.approx(1)
    assert clones["deferral_gain"] == pytest.approx(0)
    assert others["auroc"] > 0.9
    assert others["deferral_gain"] > 0.8
    assert (last["auroc"], last["deferral_gain"], last["error_correlation"]) == (None, None, None)


def test_times_show_the_tail(record: Record) -> None:
    records = []
    for query in range(100):
        agree = query >= 5
        for place, member in enumerate("ab"):
            answer = "x" if agree or not place else "y"
            records.append(
                record(
                    f"q{query}", "small", member, answer, answer == "x", seconds=0.05 + 0.01 * place
                )
            )
        records.append(record(f"q{query}", "large", "z", "x", True, seconds=0.4))
    row = only(replayed(records), "cascade", 1.0)
    assert row["p50_serial_seconds"] == pytest.approx(0.11)
    assert row["p50_parallel_seconds"] == pytest.approx(0.06)
    assert row["p99_parallel_seconds"] == pytest.approx(0.46)
    assert only(replayed(simulated(0)), "oracle")["p50_serial_seconds"] is None


def test_the_seed_decides_intervals_and_nothing_else() -> None:
    read = recording(list(enumerate(simulated(8), start=1)), "x")
    prices = dict.fromkeys(read.tiers, TOKENS)
    one, same, other = replay(read, prices, 1), replay(read, prices, 1), replay(read, prices, 2)
    assert one == same != other
    exact = ("correct", "cost", "tiers", "theta", "auroc")
    assert [[row.get(key) for key in exact] for row in one] == [
        [row.get(key) for key in exact] for row in other
    ]


def test_one_tier_is_no_cascade(record: Record) -> None:
    with pytest.raises(ConfigError, match="at least two tiers, got only small"):
        replayed([record("q", "small", "m", "a", True)])
