from itertools import chain

from fedllm_flwr.tasks.author_words import FIRST_NAMES, KINDS, LAST_NAMES


def test_lists_are_long_and_hold_nothing_twice():
    for words in (FIRST_NAMES, LAST_NAMES, *(kind.answers for kind in KINDS)):
        assert len(set(words)) == len(words) >= 24
        assert all(word == word.strip() and word for word in words)
    assert (len(FIRST_NAMES), len(LAST_NAMES)) == (64, 64)


def test_no_question_and_no_name_holds_an_answer():
    answers = {
        word.casefold() for kind in KINDS for answer in kind.answers for word in answer.split()
    }
    names = {name.casefold() for name in (*FIRST_NAMES, *LAST_NAMES)}
    assert not answers & names
    texts = chain.from_iterable(
        (kind.question, kind.paraphrase, kind.statement, kind.choice) for kind in KINDS
    )
    for text in texts:
        words = {word.strip("?.,:").casefold() for word in text.split()}
        assert not answers & words, text


def test_each_wording_has_its_places():
    for kind in KINDS:
        for text in (kind.question, kind.paraphrase, kind.statement):
            assert text.count("{name}") == 1
            assert "{options}" not in text
        assert kind.choice.count("{name}") == kind.choice.count("{options}") == 1
    assert len({kind.question for kind in KINDS}) == len(KINDS)
