from collections import Counter

import pytest

from fedllm_flwr.tasks import intents, keyboard
from fedllm_flwr.tasks.base import TaskOptions

OPTIONS = TaskOptions(name="keyboard", languages=("de", "en"))


@pytest.mark.assets
def test_a_row_is_a_sentence_up_to_a_cut_and_the_word_behind_it():
    task = keyboard.load(OPTIONS, 0)
    whole = intents.load(TaskOptions(name="intents", languages=("de", "en")), 0)
    assert task.one_word
    for split, rows in task.splits.items():
        sentences = {f"next-{row.row_id}": row for row in whole.splits[split]}
        long = [row for row in whole.splits[split] if len(row.text.split()) > 1]
        assert [row.row_id for row in rows] == [f"next-{row.row_id}" for row in long]
        for row in rows:
            sentence = sentences[row.row_id]
            words, before = sentence.text.split(), row.text.split()
            assert words[: len(before) + 1] == [*before, row.target]
            assert before
            assert (row.label, row.group, row.client) == (None, sentence.group, sentence.client)


@pytest.mark.assets
def test_cuts_differ_and_follow_the_seed():
    first, again, other = (keyboard.load(OPTIONS, seed) for seed in (0, 0, 1))
    assert first.splits == again.splits != other.splits
    lengths = Counter(len(row.text.split()) for row in first.splits["train"])
    assert len(lengths) > 3
    assert len({row.target for row in first.splits["train"]}) > 50
