"""Agreement of free texts: how similar the members' answers are to each other, and which one stands for all.

A level of similarity means nothing without what measured it: 0.85 is much for one encoder and little for another. So a
similarity has a name, a threshold belongs to a name, and the two must match.

Similar is not the same: "it is safe" and "it is not safe" are close to every encoder. Where an answer is a label or a
number, parse it and vote (:mod:`fedllm_flwr.cascade.agreement`).

Axes: k members of a tier, n texts, d size of an embedding.

Source:
    Soiffer, Kolawole and Smith 2025, Semantic agreement cascades (arXiv 2509.21837).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from fedllm_flwr.errors import ConfigError, ShapeError

Compare = Callable[[Sequence[str]], np.ndarray]
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Similarity:
    """A named way to compare texts.

    Attributes:
        name: What a threshold is tied to; changes whenever the figures may.
        compare: Takes n texts that are not empty, returns their similarities, symmetric, 1 for equal texts. [n, n]
    """

    name: str
    compare: Compare


@dataclass(frozen=True)
class Threshold:
    """An agreement from which on a tier answers.

    Attributes:
        theta: Least level; infinite: always defer.
        similarity: Name of the similarity that it was calibrated with.
    """

    theta: float
    similarity: str


@dataclass(frozen=True)
class SemanticAgreement:
    """How close the members' answers are to each other.

    Attributes:
        level: Mean similarity of all pairs.
        medoid: Place of the member whose answer is closest to the others' on average: the one to return.
        parsed: Whether there is an answer to return at all.
        similarity: Name of what measured it.
    """

    level: float
    medoid: int
    parsed: bool
    similarity: str

    def accepted(self, threshold: Threshold) -> bool:
        """Whether the tier answers: there is an answer, and the level is at least the threshold's.

        Raises:
            ConfigError: The threshold was calibrated with another similarity.
        """
        if threshold.similarity != self.similarity:
            raise ConfigError(
                f"semantic threshold: calibrated with {threshold.similarity}, expected the same similarity, "
                f"got {self.similarity}"
            )
        return self.parsed and self.level >= threshold.theta


def semantic_agreement(texts: Sequence[str | None], similarity: Similarity) -> SemanticAgreement:
    """Mean pairwise similarity of the members' answers, and the medoid.

    Args:
        texts: Of each member; None or white space where it gave no answer, which is similar to nothing (0), not even
            to another one of its kind. [k]
        similarity: How to compare two.

    Returns:
        agree = mean over i < j of S_ij; medoid = argmax over i of the mean over j ≠ i of S_ij, the first among equals.

    Raises:
        ShapeError: There are fewer than two members, so no pair; or the similarity's result is not [n, n] and finite.
    """
    members = len(texts)
    if members < 2:
        raise ShapeError(f"semantic agreement: expected at least two members, got {members}")
    given = [place for place, text in enumerate(texts) if text is not None and text.strip()]
    table = np.zeros((members, members))
    if given:
        found = np.asarray(similarity.compare([str(texts[place]) for place in given]), np.float64)
        if found.shape != (len(given), len(given)) or not np.isfinite(found).all():
            raise ShapeError(
                f"similarity {similarity.name}: expected finite [{len(given)}, {len(given)}], got {list(found.shape)}"
            )
        table[np.ix_(given, given)] = found
    np.fill_diagonal(table, 0.0)
    closeness = table.sum(axis=1) / (members - 1)
    closeness[[place for place in range(members) if place not in given]] = -np.inf
    medoid = int(np.argmax(closeness)) if given else 0
    level = float(table.sum() / (members * (members - 1)))
    return SemanticAgreement(level, medoid, bool(given), similarity.name)


def cosine(name: str, encode: Callable[[Sequence[str]], np.ndarray]) -> Similarity:
    """Cosine similarity of embeddings, in [-1, 1].

    Args:
        name: Of the encoder with whatever decides its output, such as a digest of its weights.
        encode: Takes n texts, returns their embeddings [n, d]; of any length > 0.
    """

    def compare(texts: Sequence[str]) -> np.ndarray:
        embedded = np.asarray(encode(texts), np.float64)
        norms = np.linalg.norm(embedded, axis=1, keepdims=True)
        if not (norms > 0).all():
            raise ShapeError(f"encoder {name}: expected embeddings of length > 0, got 0")
        unit = embedded / norms
        product: np.ndarray = unit @ unit.T
        return product

    return Similarity(f"cosine:{name}", compare)


def char_tfidf(corpus: Sequence[str]) -> Similarity:
    """Cosine of TF-IDF weights of character 3- to 5-grams inside words, in [0, 1]; no model needed.

    Args:
        corpus: Texts that decide how much each n-gram counts, such as the answers that θ is calibrated on. The name
            holds a digest of them.

    Raises:
        ConfigError: The corpus has no text.
    """
    kept = [text for text in corpus if text.strip()]
    if not kept:
        raise ConfigError("char_tfidf: expected a corpus with texts, got none")
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    vectorizer.fit(kept)
    digest = hashlib.sha256("\x1f".join(kept).encode()).hexdigest()[:8]

    def compare(texts: Sequence[str]) -> np.ndarray:
        weights = vectorizer.transform(texts)
        product: np.ndarray = (weights @ weights.T).toarray()
        words = np.array(texts)
        product[words[:, None] == words] = 1.0  # also where no n-gram of a text is known
        return product

    return Similarity(f"char_tfidf:{digest}", compare)


def rouge_l_f1(one: str, other: str) -> float:
    """ROUGE-L of two texts: F1 of the longest common subsequence of their lower-case words, in [0, 1].

    Source:
        Lin 2004, ROUGE, equations 2 to 4 with β = 1; without stemming.
    """
    first, second = (WORD.findall(text.lower()) for text in (one, other))
    if not first or not second:
        return float(one.split() == other.split())
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, candidate in enumerate(second, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(first) + len(second))


def _rouge_table(texts: Sequence[str]) -> np.ndarray:
    table = np.eye(len(texts))
    for row, one in enumerate(texts):
        for column in range(row):
            table[row, column] = table[column, row] = rouge_l_f1(one, texts[column])
    return table


ROUGE_L = Similarity("rouge_l", _rouge_table)
"""ROUGE-L F1 of every pair."""
