from collections import Counter

from fedllm_flwr.tasks import synthetic
from fedllm_flwr.tasks.bag_of_words import naive_bayes
from fedllm_flwr.tasks.base import TaskOptions


def test_rows_follow_the_seed_and_are_balanced():
    first = synthetic.load(TaskOptions(name="synthetic"), 0)
    assert first.splits == synthetic.load(TaskOptions(name="synthetic"), 0).splits
    assert first.splits != synthetic.load(TaskOptions(name="synthetic"), 1).splits
    for split, rows in first.splits.items():
        assert len(rows) == synthetic.SPLIT_ROWS[split]
        assert set(Counter(row.label for row in rows).values()) == {len(rows) // 4}
        assert {row.client for row in rows} == set(synthetic.GROUPS)


def test_the_topics_can_be_learned_from_words():
    splits = synthetic.load(TaskOptions(name="synthetic"), 0).splits
    result = naive_bayes(splits["train"], splits["validation"], [splits["test"]])
    assert result.overall.accuracy > 0.95


def test_more_rows_begin_with_the_usual_ones():
    usual = synthetic.load(TaskOptions(name="synthetic"), 0).splits
    more = synthetic.load(TaskOptions(name="synthetic", train_rows=500, test_rows=8), 0).splits
    assert len(more["train"]) == 500
    assert more["train"][:480] == usual["train"]
    assert more["test"] == usual["test"]
