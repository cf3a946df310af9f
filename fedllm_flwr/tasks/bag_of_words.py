"""Two baselines that know no language model: the majority class and naive Bayes on word counts.

They stand beside every result. Naive Bayes chooses its features and smoothing on validation rows, is fitted
on the training rows alone, and sees the test rows once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.metrics import Counts, count_correct, pooled

SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
FEATURES: dict[str, Callable[[], Any]] = {
    "words": CountVectorizer,
    "weighted words": partial(TfidfVectorizer, sublinear_tf=True),
    "words and pairs": partial(CountVectorizer, ngram_range=(1, 2)),
}


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """What a baseline scored on the test rows.

    Attributes:
        clients: Counts of each client, in the order of the test rows that were given.
        detail: What was chosen, for the report.
    """

    clients: tuple[Counts, ...]
    detail: str

    @property
    def overall(self) -> Counts:
        """All test rows together."""
        return pooled(self.clients)


def majority(train: Sequence[Row], tests: Sequence[Sequence[Row]]) -> BaselineResult:
    """Always answer with the most frequent label of the training rows.

    Args:
        train: Training rows with labels; a tie is decided for the lower label.
        tests: Test rows of each client.

    Raises:
        ConfigError: There are no training rows, or a row has no label.
    """
    label = int(np.argmax(np.bincount(_labels(train))))
    clients = tuple(_scored(np.full(len(test), label), test) for test in tests)
    return BaselineResult(clients, f"label {label}")


def naive_bayes(
    train: Sequence[Row], validation: Sequence[Row], tests: Sequence[Sequence[Row]]
) -> BaselineResult:
    """Multinomial naive Bayes on a bag of words.

    Args:
        train: Training rows with labels.
        validation: Rows on which features and smoothing are chosen; ties go to the simpler, smoother
            model, which is also the choice when there are no validation rows.
        tests: Test rows of each client.

    Raises:
        ConfigError: There are no training rows, a row has no label, or no training text has a word.
    """
    labels = _labels(train)
    best, best_correct, detail = None, -1, ""
    for features, new_vectorizer in FEATURES.items():
        vectorizer = new_vectorizer()
        counts = _fit_words(vectorizer, train)
        for smoothing in SMOOTHING:
            model = make_pipeline(vectorizer, MultinomialNB(alpha=smoothing))
            model[-1].fit(counts, labels)
            correct = _scored(_predict(model, validation), validation).correct
            if correct > best_correct:
                best, best_correct = model, correct
                detail = f"{features}, smoothing {smoothing:g}"
    return BaselineResult(tuple(_scored(_predict(best, test), test) for test in tests), detail)


def _labels(rows: Sequence[Row]) -> np.ndarray:
    if not rows:
        raise ConfigError("bag of words: expected training rows, got none")
    for row in rows:
        if row.label is None:
            raise ConfigError(
                f"bag of words: expected a label for every row, row {row.row_id} has none"
            )
    return np.array([row.label for row in rows])


def _fit_words(vectorizer: Any, rows: Sequence[Row]) -> Any:
    try:
        return vectorizer.fit_transform([row.text for row in rows])
    except ValueError as error:
        raise ConfigError(f"bag of words: expected words in the training texts: {error}") from None


def _predict(model: Any, rows: Sequence[Row]) -> np.ndarray:
    texts = [row.text for row in rows]
    return np.asarray(model.predict(texts)) if texts else np.empty(0, dtype=int)


def _scored(predictions: np.ndarray, rows: Sequence[Row]) -> Counts:
    return count_correct(predictions, _labels(rows)) if rows else Counts()
