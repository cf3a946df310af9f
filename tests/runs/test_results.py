import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.results import (
    count_test_rows,
    headline,
    main_metric,
    result_rows,
    wilson_interval,
)
from fedllm_flwr.runs.snapshot import Snapshot


def rows_of(run: RunDirectory) -> tuple[Snapshot, list]:
    snapshot = Snapshot.read(run)
    return snapshot, result_rows(snapshot)


def test_the_table_holds_the_baselines_in_order_and_the_method_last(make_run) -> None:
    snapshot, rows = rows_of(make_run())
    assert [row.name for row in rows] == [
        "majority",
        "bag_of_words",
        "zero_shot",
        "local_only",
        "centralised",
        "federated",
    ]
    ours = rows[-1]
    assert (ours.label, ours.accuracy, ours.loss, ours.worst_client_accuracy) == (
        "Federated (fedlora)",
        0.9375,
        1.0625,
        0.875,
    )
    assert count_test_rows(snapshot) == (120, 128)
    assert ours.interval == wilson_interval(120, 128)
    assert rows[1].interval == wilson_interval(112, 128)
    assert (rows[3].detail, rows[1].detail) == ("learning rate 0.001", "naive Bayes")
    assert main_metric(rows) == "accuracy"


def test_no_interval_where_the_counts_do_not_confirm_the_accuracy(make_run) -> None:
    run = make_run(baselines=False)
    run.append(
        {"kind": "baseline", "name": "local_only", "accuracy": 0.8123}
    )  # no whole number of 128 rows
    run.append(
        {"kind": "baseline", "name": "majority", "accuracy": 0.25, "total": 400}
    )  # its own rows
    run.write_summary(run.summary() | {"accuracy": 0.9})
    intervals = {row.name: row.interval for row in rows_of(run)[1]}
    assert intervals == {
        "local_only": None,
        "majority": wilson_interval(100, 400),
        "federated": None,
    }


def test_the_last_baseline_of_a_name_counts_and_unknown_names_are_shown(make_run) -> None:
    run = make_run(baselines=False)
    for accuracy in (0.25, 0.5):
        run.append({"kind": "baseline", "name": "zero_shot", "accuracy": accuracy})
    run.append({"kind": "baseline", "name": "nearest_neighbour", "accuracy": 0.75})
    rows = rows_of(run)[1]
    assert [(row.label, row.accuracy) for row in rows[:2]] == [
        ("Zero-shot base model", 0.5),
        ("nearest_neighbour", 0.75),
    ]


def test_the_headline_in_full(make_run) -> None:
    assert headline(*rows_of(make_run())) == [
        "fedlora reached 0.938 accuracy (95 % interval 0.882 to 0.968, 128 test rows) after 4 rounds with 8 clients.",
        "The federated result is 0.500 above the majority class, 0.562 above the zero-shot base model, "
        "0.125 above local-only training and 0.016 below centralised training.",
        "It beats the bag of words (0.875) by 0.062.",
    ]


@pytest.mark.parametrize(
    ("bag_of_words", "sentence", "is_first"),
    [
        (0.984375, "The bag of words wins: 0.984 against 0.938.", True),
        (
            0.953125,
            "The bag of words wins: 0.953 against 0.938. The gap is inside the 95 % interval.",
            True,
        ),
        (0.9375, "The bag of words is as good: 0.938, without a language model.", False),
        (
            0.921875,
            "It beats the bag of words (0.922) by 0.016. The gap is inside the 95 % interval.",
            False,
        ),
        (0.75, "It beats the bag of words (0.750) by 0.188.", False),
    ],
)
def test_the_bag_of_words_gets_its_due(
    make_run, bag_of_words: float, sentence: str, is_first: bool
) -> None:
    run = make_run(baselines=False)
    run.append({"kind": "baseline", "name": "bag_of_words", "accuracy": bag_of_words})
    sentences = headline(*rows_of(run))
    assert sentences[0 if is_first else -1].endswith(sentence)
    assert ("wins" in sentences[0]) == is_first


def test_an_unfinished_run_says_so(make_run) -> None:
    sentences = headline(*rows_of(make_run(rounds=2, finished=False)))
    assert sentences[0].startswith("fedlora reached 0.750 accuracy")
    assert (
        sentences[1]
        == "The run is unfinished (2 of 4 rounds): these are its latest figures, not its result."
    )


def test_without_a_round_there_is_no_result(make_run) -> None:
    for baselines in (True, False):
        snapshot, rows = rows_of(
            make_run(f"b{baselines}", rounds=None, finished=False, baselines=baselines)
        )
        assert len(rows) == 5 * baselines
        assert headline(snapshot, rows) == [
            "There is no federated result: the run is unfinished (0 of 4 rounds), and no evaluation was recorded."
        ]


def test_an_instruction_task_is_judged_by_bits_per_character(tmp_path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"config": {"method": {"name": "fedlora"}}})
    run.append({"kind": "baseline", "name": "zero_shot", "loss": 3.5, "bits_per_character": 1.5})
    run.append({"kind": "baseline", "name": "centralised", "loss": 2.5, "bits_per_character": 1.0})
    run.append(
        {"kind": "round", "round": 1, "rounds": 1, "loss": 2.75, "bits_per_character": 1.125}
    )
    snapshot, rows = rows_of(run)
    assert main_metric(rows) == "bits_per_character"
    sentences = headline(snapshot, rows)
    assert sentences[0] == "fedlora reached 1.125 bits per character after 1 round."
    assert sentences[-1] == (
        "The federated result is 0.375 better than the zero-shot base model and 0.125 worse than centralised training."
    )


def test_with_nothing_else_the_loss_decides(tmp_path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    run.append({"kind": "round", "round": 1, "rounds": 1, "loss": 2.75})
    run.write_summary({"loss": 2.75, "num_clients": 1})
    assert headline(*rows_of(run)) == ["federated reached 2.750 loss after 1 round with 1 client."]


def test_wilson_against_a_published_value() -> None:
    # Newcombe 1998, Table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for counts, interval in published.items():
        assert wilson_interval(*counts) == pytest.approx(interval, abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 10_000), st.data())
def test_an_interval_holds_the_fraction_and_mirrors(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_the_interval_matches_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, Wilson score 0.2553 to 0.3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_fraction(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1
