import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.cascade import (
    ROUGE_L,
    Similarity,
    Threshold,
    char_tfidf,
    cosine,
    semantic_agreement,
)
from fedllm_flwr.cascade.semantic import rouge_l_f1
from fedllm_flwr.errors import ConfigError, ShapeError

CORPUS = ["the cat sat on the mat", "a dog lay on the rug", "the cat is on a mat"]
TABLE = np.array([[1.0, 0.9, 0.5], [0.9, 1.0, 0.7], [0.5, 0.7, 1.0]])
by_hand = Similarity("by_hand", lambda texts: TABLE[: len(texts), : len(texts)])


def test_the_level_is_the_mean_of_pairs_and_the_medoid_the_closest_to_the_others() -> None:
    found = semantic_agreement(["a", "b", "c"], by_hand)
    assert found.level == pytest.approx((0.9 + 0.5 + 0.7) / 3)
    assert found.medoid == 1


def test_no_answer_is_like_nothing_and_is_never_returned() -> None:
    found = semantic_agreement([None, "a", " "], by_hand)
    assert (found.level, found.medoid, found.parsed) == (0.0, 1, True)
    found = semantic_agreement(["", "a", "b"], by_hand)
    assert found.level == pytest.approx(0.9 / 3)
    silent = semantic_agreement([None, ""], by_hand)
    assert not silent.accepted(Threshold(0.0, "by_hand"))
    assert silent.level == 0


def test_among_equals_the_first_is_returned() -> None:
    flat = Similarity("flat", lambda texts: np.ones((len(texts), len(texts))))
    assert semantic_agreement(["a", "b", "c"], flat).medoid == 0


def test_a_threshold_belongs_to_what_it_was_calibrated_with() -> None:
    found = semantic_agreement(["a", "b", "c"], by_hand)
    assert found.accepted(Threshold(found.level, "by_hand")), "at the threshold is enough"
    assert not found.accepted(Threshold(np.nextafter(found.level, 1), "by_hand"))
    with pytest.raises(ConfigError, match=r"calibrated with other, expected .* got by_hand"):
        found.accepted(Threshold(0.0, "other"))


def test_cosines_do_not_depend_on_lengths_and_carry_the_encoders_name() -> None:
    vectors = {"a": [1.0, 0.0], "b": [3.0, 3.0], "c": [-2.0, 0.0]}
    similarity = cosine("toy:1", lambda texts: np.array([vectors[t] for t in texts]))
    assert similarity.name == "cosine:toy:1"
    found = similarity.compare(["a", "b", "c"])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[1, half, -1], [half, 1, -half], [-1, -half, 1]], atol=1e-12)
    empty = cosine("toy", lambda texts: np.zeros((len(texts), 2)))
    with pytest.raises(ShapeError, match="encoder toy: expected embeddings of length > 0"):
        empty.compare(["a", "b"])


def test_rouge_l_by_hand() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" has 3 of 4 words in common with the first, 2 with the second.
    reference = "police killed the gunman"
    assert rouge_l_f1(reference, "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l_f1(reference, "the gunman kill police") == pytest.approx(0.5)
    assert rouge_l_f1("a b c d", "a c") == pytest.approx(2 * 2 / 6)
    assert rouge_l_f1("Cat, sat!", "cat sat") == 1
    assert rouge_l_f1("a", "...") == 0
    assert rouge_l_f1("...", "...") == 1


def longest(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The recursive definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return longest(one[:-1], other[:-1]) + 1
    return max(longest(one[:-1], other), longest(one, other[:-1]))


words = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


@given(words, words)
def test_rouge_l_is_the_definition(one: list[str], other: list[str]) -> None:
    expected = 2 * longest(tuple(one), tuple(other)) / (len(one) + len(other))
    assert rouge_l_f1(" ".join(one), " ".join(other)) == pytest.approx(expected)


@pytest.mark.parametrize("similarity", [ROUGE_L, char_tfidf(CORPUS)], ids=lambda s: s.name)
def test_lexical_similarities_are_symmetric_with_ones_for_equals(similarity: Similarity) -> None:
    texts = [*CORPUS, CORPUS[0], "zzz 中文", "zzz 中文"]
    found = similarity.compare(texts)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose([found[0, 3], found[4, 5]], 1)
    assert ((found > -1e-12) & (found < 1 + 1e-12)).all()
    assert found[0, 2] > found[0, 1] > found[0, 4]


def test_a_corpus_is_part_of_the_name() -> None:
    one, same, other = char_tfidf(CORPUS), char_tfidf(CORPUS), char_tfidf(CORPUS[:2])
    assert one.name == same.name != other.name
    with pytest.raises(ConfigError, match="expected a corpus with texts, got none"):
        char_tfidf([" "])


def test_a_negation_is_close_to_every_lexical_metric() -> None:
    for similarity in (ROUGE_L, char_tfidf(CORPUS)):
        found = semantic_agreement(
            ["it is safe to drink this water", "it is not safe to drink this water"], similarity
        )
        assert found.level > 0.7, "which is why labels are parsed and voted on"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least two members, got 1"):
        semantic_agreement(["a"], by_hand)
    odd = Similarity("odd", lambda texts: np.full((len(texts), 1), np.nan))
    with pytest.raises(ShapeError, match=r"similarity odd: expected finite \[2, 2\], got \[2, 1\]"):
        semantic_agreement(["a", "b"], odd)
