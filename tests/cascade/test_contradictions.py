import numpy as np
import pytest

from fedllm_flwr.cascade.contradictions import TRIPLES, judged
from fedllm_flwr.cascade.semantic import ROUGE_L, Similarity, cosine
from fedllm_flwr.models.sentences import load_minilm


def test_shares_are_those_of_the_pairs() -> None:
    def compare(texts: list[str]) -> np.ndarray:
        table = np.eye(len(texts))
        for k in range(len(TRIPLES)):
            table[3 * k, 3 * k + 1] = 0.5 if k % 2 else 0.9
            table[3 * k, 3 * k + 2] = 0.6
        return table

    rows = judged(Similarity("told", compare), [0.5, 0.6, 0.7])
    assert [row["paraphrases_accepted"] for row in rows] == [1.0, 0.5, 0.5]
    assert [row["contradictions_accepted"] for row in rows] == [1.0, 1.0, 0.0]


def test_every_triple_has_three_sentences_of_its_own() -> None:
    texts = [text for triple in TRIPLES for text in triple]
    assert len(set(texts)) == 3 * len(TRIPLES) == 60


def test_words_in_common_pass_contradictions_before_paraphrases() -> None:
    (row,) = judged(ROUGE_L, [0.7])
    assert row["contradictions_accepted"] > 0.7 > 0.3 > row["paraphrases_accepted"]


@pytest.mark.slow
def test_the_real_encoder_takes_most_contradictions_for_agreement() -> None:
    """The reason why labels are parsed and voted on."""
    encoder = load_minilm()
    (row,) = judged(cosine(encoder.name, encoder), [0.7])
    assert row["contradictions_accepted"] > 0.5
