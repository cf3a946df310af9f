import os

import numpy as np
import pytest

from fedllm_flwr.errors import DataError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.report import MANY, write_report


@pytest.fixture
def read(parse_page):
    return lambda run: parse_page(write_report(run).read_text())


def column(table: list[list[str]], name: str) -> list[str]:
    return [row[table[0].index(name)] for row in table[1:]]


def test_the_page_holds_the_figures_of_the_run(make_run, read) -> None:
    run = make_run()
    page = read(run)
    assert sorted(os.listdir(run.path)) == [
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]
    assert (
        "fedlora reached 0.938 accuracy (95 % interval 0.882 to 0.968, 128 test rows)" in page.text
    )
    assert "It beats the bag of words (0.875) by 0.062." in page.text
    results = page.table("how")
    assert column(results, "") == [
        "Majority class",
        "Bag of words",
        "Zero-shot base model",
        "Local-only training",
        "Centralised training",
        "Federated (fedlora)",
    ]
    assert column(results, "accuracy")[-1] == "0.938 0.882–0.968"
    assert column(results, "worst client") == ["0.125", "0.750", "0.250", "–", "–", "0.875"]
    rounds = page.table("training loss")
    assert column(rounds, "accuracy") == ["0.375", "0.500", "0.750", "0.875", "0.938"]
    assert column(rounds, "training uplink") == ["–", *["8.00 MB"] * 4]
    clients = page.table("CPU time")
    worst_first = [0, 2, 4, 6, 1, 3, 5, 7]
    assert column(clients, "client") == [f"publisher <{i}> ({i})" for i in worst_first]
    spread = "mean 0.938 (standard deviation 0.062), worst 0.875 (client 0), worst tenth 0.875, best 1.000"
    assert spread in page.text
    ledger = page.table("per message")
    assert ["uplink, train", "32.0 MB", "32,000,000", "32", "1.00 MB"] in ledger
    assert ["all uplink", "32.0 MB", "32,008,000", "72", "445 kB"] in ledger
    assert ["train", "2 min 40 s", "87%"] in page.table("phase")
    assert "No reply failed." in page.text
    assert ["method.rank", "8"] in page.table("key")
    assert "fedllm experiment=r8_demo" in page.text
    assert "seed 1; fingerprint 0123456789abcdef; adapter SHA-256 abab" in page.text


def test_the_page_needs_nothing_but_itself(make_run, read) -> None:
    for tag, attributes in read(make_run()).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src", "action"):
                assert value is not None
                assert value.startswith("#")


def test_ids_are_unique(make_run, read) -> None:
    ids = [a["id"] for _, a in read(make_run()).elements if "id" in a]
    assert ids
    assert len(ids) == len(set(ids))


def test_where_the_bag_of_words_wins_the_first_sentence_says_so(make_run, read) -> None:
    run = make_run()
    run.append({"kind": "baseline", "name": "bag_of_words", "accuracy": 0.984375})
    assert "with 8 clients. The bag of words wins: 0.984 against 0.938." in read(run).text


@pytest.mark.parametrize("rounds", [None, 0, 1, 2])
def test_an_unfinished_run_has_a_page_too(make_run, read, rounds: int | None) -> None:
    page = read(make_run(rounds=rounds, finished=False))
    assert f"unfinished ({rounds or 0} of 4 rounds)" in page.text
    assert ("There is no federated result" in page.text) == (rounds is None)
    assert f"{rounds or 0} of 4" in page.text


def test_a_bare_run_has_a_page_too(tmp_path, read) -> None:
    page = read(RunDirectory.create(tmp_path / "bare", {}))
    assert "Nothing was evaluated yet." in page.text
    assert "No round was recorded." in page.text
    assert "fedllm experiment=bare" in page.text


def test_a_run_that_failed_midway_names_its_failures(make_run, read) -> None:
    run = make_run(rounds=1, finished=False)
    run.append(
        {
            "kind": "failure",
            "round": 2,
            "partition_id": 3,
            "reason": "layer <0>: expected (8, 64), got (4, 64)",
        }
    )
    run.append({"kind": "failure", "round": 2, "reason": "no answer in 3600 s"})
    run.append({"kind": "event", "text": "gave up: 1 of 8 replies <good>"})
    page = read(run)
    assert page.table("reason")[1:] == [
        ["2", "3", "layer <0>: expected (8, 64), got (4, 64)"],
        ["2", "–", "no answer in 3600 s"],
    ]
    assert "gave up: 1 of 8 replies <good>" in page.text


def test_an_instruction_task_needs_no_accuracy(tmp_path, read) -> None:
    run = RunDirectory.create(tmp_path / "run", {"config": {"method": {"name": "fedlora"}}})
    run.append({"kind": "baseline", "name": "zero_shot", "loss": 3.5, "bits_per_character": 1.5})
    for number in (1, 2):
        run.append(
            {
                "kind": "evaluation",
                "round": number,
                "partition_id": 0,
                "split": "test",
                "total": 4,
                "loss_sum": 9.0,
            }
        )
        run.append(
            {
                "kind": "round",
                "round": number,
                "rounds": 2,
                "loss": 2.25,
                "bits_per_character": 1.125,
            }
        )
    run.write_summary({"loss": 2.25, "bits_per_character": 1.125, "num_clients": 1})
    page = read(run)
    assert "reached 1.125 bits per character after 2 rounds with 1 client." in page.text
    assert page.table("how")[0] == ["", "bits per character", "loss", "how"]
    assert (
        "Not measured in this run: local-only training, centralised training, federated, then tuned by each client."
        in page.text
    )
    assert "each counted once" not in page.text  # one client has no spread
    assert column(page.table("CPU time"), "test loss") == ["2.250"]


def test_thousands_of_clients_fit_on_a_page(make_run, read) -> None:
    run = make_run(rounds=1, finished=False, clients=1000)
    page = read(run)
    assert len(page.table("CPU time")) == MANY + 1
    assert f"The {MANY} worst clients are shown; 800 more are in metrics.jsonl." in page.text
    assert write_report(run).stat().st_size < 400_000


def test_hostile_text_anywhere_stays_text(tmp_path, read) -> None:
    evil = "</style></svg><script>alert(1)</script>$\\frac{$"
    run = RunDirectory.create(
        tmp_path / "run",
        {
            "experiment": evil,
            "command": evil,
            "config": {evil: evil, "method": {"name": evil}},
            "environment": {"cpu": evil},
        },
    )
    run.append({"kind": "client", "round": 1, "partition_id": 0, "name": evil})
    run.append({"kind": "evaluation", "round": 1, "partition_id": 0, "split": "test", "correct": 1, "total": 2,
                "loss_sum": 1.0})  # fmt: skip
    run.append({"kind": "group", "round": 1, "split": "test", "correct": 1, "total": 2, "loss_sum": 1.0,
                "group": evil})  # fmt: skip
    run.append({"kind": "multiplier", "round": 1, "group": evil, "multiplier": 0.5})
    run.append(
        {"kind": "bytes", "round": 1, "direction": evil, "message": evil, "bytes": 1, "messages": 1}
    )
    run.append({"kind": "baseline", "name": evil, "accuracy": 0.5, "detail": evil})
    run.append({"kind": "failure", "round": 1, "partition_id": 0, "reason": evil})
    run.append({"kind": "event", "text": evil})
    run.append({"kind": "round", "round": 1, "accuracy": 0.5, "loss": 0.5})
    page = read(run)
    assert "script" not in [tag for tag, _ in page.elements]
    assert page.text.count("<script>alert(1)</script>") >= 14


def test_the_same_run_gives_the_same_page(make_run) -> None:
    run = make_run()
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_numpy_figures_and_null_ones_are_fine(make_run, read) -> None:
    run = make_run(rounds=1, finished=False)
    run.append(
        {
            "kind": "round",
            "round": 2,
            "rounds": 4,
            "accuracy": np.float32(0.5),
            "loss": float("nan"),
        }
    )
    assert column(read(run).table("training loss"), "test loss")[-1] == "–"


def test_a_damaged_run_is_named(make_run) -> None:
    run = make_run()
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(b"damage\n" + metrics.read_bytes())
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1"):
        write_report(run)
    assert not (run.path / "report.html").exists()
