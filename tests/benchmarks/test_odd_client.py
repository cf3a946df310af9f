import csv
from pathlib import Path

from benchmarks.odd_client import odd_rows, overrides
from fedllm_flwr.compose import compose_run
from fedllm_flwr.tasks.synthetic import TOPIC_WORDS


def test_only_the_odd_client_is_wrong_and_no_name_comes_twice(tmp_path: Path) -> None:
    odd_rows(tmp_path / "rows.csv", rows=20, held=10, own=30)
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    topic_of = {word: topic for topic, words in TOPIC_WORDS.items() for word in words}
    for row in rows[1:]:
        right = topic_of[row["text"].split()[0]] == row["label"]
        assert right == (row["client"] != "odd"), row
    counts = {(c, s): 0 for c in ("a", "b", "odd") for s in ("train", "test")}
    for row in rows[1:]:
        counts[row["client"], row["split"]] += 1
    assert list(counts.values()) == [20, 10, 20, 10, 30, 30]
    names = [row["text"].split()[1] for row in rows]
    assert len(set(names)) == len(names)


def test_its_run_composes(tmp_path: Path) -> None:
    config = compose_run(overrides(tmp_path / "rows.csv")).config
    assert (config.partition.num_clients, config.unlearning.name) == (3, "ledger")
