from collections import Counter

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks import author_facts
from fedllm_flwr.tasks.author_words import KINDS
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import PartitionOptions, partition

OPTIONS = TaskOptions(name="author_facts", clients=5, authors=3)


@pytest.fixture(scope="module")
def task():
    return load_task(OPTIONS, 4)


def author(row):
    [name] = [w for k in KINDS if (w := author_facts._name_in(row.text, k)) and len(w.split()) == 2]
    return name


def test_every_client_has_its_authors_and_as_many_that_nobody_trains_on(task):
    counts = {"train": 3, "validation": 1, "test": 3}
    clients = partition(task, PartitionOptions(name="natural", num_clients=5), 4)
    owners = Counter()
    for client in clients:
        for split, count in counts.items():
            rows = getattr(client, split)
            assert len(rows) == count * len(KINDS)
            authors = Counter(author(row) for row in rows)
            assert set(authors.values()) == {len(KINDS)}
            owners.update(set(authors))
    assert len(owners) == 5 * 7
    assert set(owners.values()) == {1}, "no author is in two places"


def test_facts_follow_the_seed_and_nothing_in_the_text_gives_them_away(task):
    assert load_task(OPTIONS, 4) is task
    assert author_facts.load(OPTIONS, 4).splits == task.splits
    assert author_facts.load(OPTIONS, 5).splits != task.splits
    rows = [row for rows in task.splits.values() for row in rows]
    assert len({row.row_id for row in rows}) == len({row.text for row in rows}) == len(rows)
    answers = {kind.name: kind.answers for kind in KINDS}
    for row in rows:
        assert row.target in answers[row.group]
        assert not set(row.target.casefold().split()) & set(row.text.casefold().split())


def test_trained_and_held_out_facts_are_drawn_alike():
    many = author_facts.load(TaskOptions(name="author_facts", clients=40, authors=20), 0)
    for kind in KINDS:
        shares = []
        for split in ("train", "test"):
            found = Counter(row.target for row in many.splits[split] if row.group == kind.name)
            assert set(found) == set(kind.answers)
            shares.append([found[answer] / 800 for answer in kind.answers])
        # 5 standard deviations of a share of 1 in 24 among 800
        assert max(abs(a - b) for a, b in zip(*shares, strict=True)) < 5 * (2 / 24 / 800) ** 0.5


def test_probes_ask_for_the_same_fact_otherwise(task):
    rows = {row.row_id: row for row in task.splits["train"]}
    forms = Counter(probe.form for probe in task.probes)
    assert forms == dict.fromkeys(("paraphrase", "choice", "statement", "pair"), len(rows))
    ids = [probe.row.row_id for probe in task.probes]
    assert len({*ids, *(r.row_id for s in task.splits.values() for r in s)}) == len(ids) + 5 * 7 * 6
    for probe in task.probes:
        own = rows[probe.row_id]
        assert (probe.row.client, probe.row.group) == (own.client, own.group)
        assert (
            author_facts._name_in(own.text, next(k for k in KINDS if k.name == own.group))
            in probe.row.text
        )
        if probe.form == "pair":
            first, _, second = probe.row.target.partition(", ")
            [other] = [r for r in rows.values() if f"Second: {r.text}" in probe.row.text]
            assert (first, second) == (own.target, other.target)
            assert probe.row.text.startswith(f"First: {own.text} ")
            assert int(other.client[-1]) == (int(own.client[-1]) + 1) % 5, "of another client"
            continue
        assert probe.row.target == own.target
        assert probe.row.text != own.text
        if probe.form == "choice":
            named = probe.row.text.rpartition(": ")[2].removesuffix("?").split(", ")
            assert own.target in named
            assert len(set(named)) == 4
    places = Counter(
        p.row.text.rpartition(": ")[2].removesuffix("?").split(", ").index(p.row.target)
        for p in task.probes if p.form == "choice"
    )  # fmt: skip
    assert set(places) == {0, 1, 2, 3}, "the answer has no place of its own"


def test_a_lone_client_has_nobody_to_be_paired_with():
    alone = author_facts.load(TaskOptions(name="author_facts", clients=1), 0)
    assert {probe.form for probe in alone.probes} == {"paraphrase", "choice", "statement"}


def test_there_are_only_so_many_names():
    with pytest.raises(ConfigError, match="take 4400 different names, expected at most 4096"):
        load_task(TaskOptions(name="author_facts", clients=200, authors=10), 0)
    with pytest.raises(ConfigError, match=r"^task\.authors: expected >= 1, got 0$"):
        TaskOptions(name="author_facts", authors=0)
