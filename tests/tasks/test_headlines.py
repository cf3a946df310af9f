from collections import Counter

import pytest

from fedllm_flwr.tasks import headlines
from fedllm_flwr.tasks.base import TaskOptions

PUBLISHERS = {
    "abcnews.go.com": 472,
    "aljazeera.com": 478,
    "bbc.co.uk": 345,
    "cnn.com": 273,
    "dw.com": 432,
    "europe.chinadaily.com.cn": 359,
    "huffingtonpost.com": 424,
    "rte.ie": 434,
    "tass.com": 481,
}


@pytest.mark.assets
def test_nine_publishers_and_every_long_enough_article():
    rows = headlines.read_articles()
    assert Counter(row.client for row in rows) == PUBLISHERS
    assert len({row.row_id for row in rows}) == len(rows) == 3698
    for row in rows:
        assert row.label is None
        assert row.group == row.client
        assert row.target
        assert headlines.LEAST_WORDS <= len(row.text.split()) <= headlines.SHOWN_WORDS


@pytest.mark.assets
def test_all_complete_articles_are_read_when_no_length_is_asked(monkeypatch):
    monkeypatch.setattr(headlines, "LEAST_WORDS", 1)
    assert len(headlines.read_articles()) == 3729


@pytest.mark.assets
def test_splits_are_balanced_by_publisher_and_share_no_article():
    task = headlines.load(TaskOptions(name="headlines"), 0)
    assert task.kind == "instruction"
    texts = [{row.text for row in rows} for rows in task.splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        counts = Counter(row.client for row in task.splits[split])
        for publisher, size in PUBLISHERS.items():
            assert counts[publisher] == pytest.approx(share * size, abs=3)
