from collections import Counter

import pytest

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.tasks import vader
from fedllm_flwr.tasks.base import TaskOptions


@pytest.mark.assets
@pytest.mark.parametrize(
    ("domain", "rows", "positive"),
    [("movie", 9173, 4598), ("amazon", 2455, 1514), ("tweets", 2667, 1830), ("nyt", 1554, 558)],
)
def test_clear_ratings_of_each_domain(domain, rows, positive):
    found = vader.read_domain(domain)
    assert len(found) == rows
    assert sum(row.label for row in found) == positive
    assert {(row.group, row.client) for row in found} == {(domain, domain)}
    assert all(row.target == vader.LABELS[row.label] and row.text for row in found)


@pytest.mark.assets
def test_documents_are_never_divided():
    task = vader.load(TaskOptions(name="vader_sentiment"), 0)
    documents = [{vader.document(row) for row in rows} for rows in task.splits.values()]
    assert sum(map(len, documents)) == len(set.union(*documents))
    rows = [row for rows in task.splits.values() for row in rows]
    assert len({row.row_id for row in rows}) == len(rows) == 9173 + 2455 + 2667 + 1554


@pytest.mark.assets
def test_splits_are_balanced_by_domain_and_label():
    task = vader.load(TaskOptions(name="vader_sentiment", domains=("movie", "tweets")), 0)
    counts = {
        name: Counter((row.group, row.label) for row in rows) for name, rows in task.splits.items()
    }
    total = sum(counts.values(), Counter())
    assert {domain for domain, _ in total} == {"movie", "tweets"}
    for cell, size in total.items():
        assert counts["train"][cell] == pytest.approx(0.7 * size, abs=2)
        assert counts["validation"][cell] == pytest.approx(0.1 * size, abs=2)
        assert counts["test"][cell] == pytest.approx(0.2 * size, abs=2)


def test_an_unknown_domain_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^task\.domains: expected some of movie, amazon, tweets, "
    ):
        vader.load(TaskOptions(name="vader_sentiment", domains=("songs",)), 0)


@pytest.mark.parametrize("line", ["2\tgood\tA film.", "2\t1.5", "2"])
def test_a_line_without_a_rating_is_named(line, monkeypatch):
    monkeypatch.setattr(vader, "_member", lambda _: f"1\t2.5\tGreat.\n{line}\n")
    with pytest.raises(
        DataError, match=r"^movieReviewSnippets_GroundTruth\.txt, line 2, column 2: "
    ):
        vader.read_domain("movie")


def test_ratings_near_zero_are_left_out(monkeypatch):
    text = "1\t0.99\tMeh.\n2\t1.0\tGood.\n3\t-0.99\tHm.\n4\t-1.0\tBad.\n"
    monkeypatch.setattr(vader, "_member", lambda _: text)
    assert [(row.text, row.label) for row in vader.read_domain("nyt")] == [
        ("Good.", 1),
        ("Bad.", 0),
    ]
