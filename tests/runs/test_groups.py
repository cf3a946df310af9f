import pytest

from fedllm_flwr.runs.groups import Group, Row, differing_keys, make_groups, read_rows


def method(rank: int) -> dict:
    return {"name": "fedlora", "rank": rank, "target_modules": ["q_proj"]}


def test_runs_that_differ_in_their_seed_only_are_one_group(make_run) -> None:
    paths = [
        make_run(
            f"{rank}-{seed}",
            seed=seed,
            offset=0.0625 * (seed - 2),
            rounds=3,
            clients=4,
            method=method(rank),
        ).path
        for rank in (4, 8)
        for seed in (1, 2, 3)
    ]
    rows = read_rows(paths)
    assert [row.name for row in rows] == ["4-1", "4-2", "4-3", "8-1", "8-2", "8-3"]
    keys = differing_keys(rows)
    assert keys == ["method.rank"]
    groups = make_groups(rows, keys)
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("method.rank=4", 3),
        ("method.rank=8", 3),
    ]
    # Accuracies 0.8125, 0.875, 0.9375.
    assert groups[0].mean("accuracy") == pytest.approx((0.875, 0.0625))
    assert groups[0].mean("bits_per_character") is None


def test_one_run_has_no_deviation(make_run) -> None:
    rows = read_rows([make_run().path])
    group = make_groups(rows, differing_keys(rows))[0]
    assert (group.label, group.mean("accuracy")) == ("all runs", (0.9375, 0.0))


def test_unfinished_and_unreadable_runs_are_rows_but_in_no_mean(make_run, tmp_path) -> None:
    whole, half = make_run("whole"), make_run("half", seed=2, rounds=2, finished=False)
    none = make_run("none", seed=3, rounds=None, finished=False)
    damaged = make_run("damaged", seed=4)
    (damaged.path / "summary.json").write_text("{")
    rows = read_rows([whole.path, half.path, none.path, damaged.path, tmp_path / "absent"])
    assert [row.status.split(" (")[0] for row in rows] == [
        "finished",
        "unfinished",
        "unfinished",
        "cannot be read",
        "cannot be read",
    ]
    assert rows[1].figures["accuracy"] == 0.75  # its latest, shown but not averaged
    assert rows[2].figures == {}
    (group,) = make_groups(rows, differing_keys(rows))
    assert (len(group.runs), len(group.finished)) == (3, 1)
    assert group.mean("accuracy") == (0.9375, 0.0)


def test_keys_that_follow_from_the_experiment_are_left_out(make_run) -> None:
    rows = read_rows(
        [
            make_run(f"{name}{rank}", experiment=name, num_rounds=rounds, method=method(rank)).path
            for name, rounds in (("small", 2), ("large", 9))
            for rank in (4, 8)
        ]
    )
    assert differing_keys(rows) == ["experiment", "method.rank"]
    assert len(make_groups(rows, differing_keys(rows))) == 4


def test_a_key_that_only_some_runs_have_differs(make_run) -> None:
    rows = read_rows([make_run("a").path, make_run("b", fairness={"name": "qffl"}).path])
    assert differing_keys(rows) == ["fairness.name"]
    assert [g.label for g in make_groups(rows, ["fairness.name"])] == [
        "fairness.name=–",
        "fairness.name=qffl",
    ]


def test_names_are_paths_below_the_shared_folder(make_run, tmp_path) -> None:
    rows = read_rows([make_run("sweep/one/0").path, make_run("sweep/two/0").path])
    assert [row.name for row in rows] == ["one/0", "two/0"]
    assert read_rows([]) == []


def test_the_figures_of_the_selected_round_count(make_run) -> None:
    run = make_run()
    run.write_summary({"selected_round": 3, "loss": 1.125})
    assert read_rows([run.path])[0].figures["accuracy"] == 0.875


def test_the_interval_of_a_mean_is_students() -> None:
    """By hand: of 1, 2, 3 the mean is 2, the deviation 1, and t(2, 0.975) = 4.302653."""
    runs = [
        Row(str(v), "finished", {}, {"loss": float(v), "accuracy": v / 4}) for v in (1, 2, 3)
    ] + [Row("cut", "unfinished", {}, {"loss": 99.0})]
    group = Group({}, runs)
    assert group.interval("loss") == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert group.interval("accuracy") == pytest.approx((0.0, 1.0))
    assert group.interval("absent") is None
    assert Group({}, runs[:1]).interval("loss") is None
