"""A router that decides before anybody has answered: from the words of a query alone.

What a cascade has to beat where small members are dear: it pays one tier, never two.

Axes: Q queries, n queries that are known.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from fedllm_flwr.cascade.curves import Walk, check_tiers
from fedllm_flwr.cascade.outcomes import TierOutcomes
from fedllm_flwr.errors import ShapeError


def promise(known: Sequence[str], right: np.ndarray, queries: Sequence[str]) -> np.ndarray | None:
    """How probably the first tier answers each query rightly, said by a model of the queries' words.

    Args:
        known: Texts of held-out queries. [n]
        right: Whether the first tier has answered them rightly. bool [n]
        queries: Texts of the queries to route. [Q]

    Returns:
        Probabilities [Q] of a logistic regression on TF-IDF of words; None where nothing can be learned, because all
        held-out answers are right, or all wrong.

    Raises:
        ShapeError: The lengths differ.
    """
    if len(known) != len(right):
        raise ShapeError(
            f"router: expected an outcome for each of {len(known)} texts, got {len(right)}"
        )
    if len(set(right.tolist())) < 2:
        return None
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    model.fit(list(known), right.astype(bool))
    found: np.ndarray = model.predict_proba(list(queries))[:, 1]
    return found


def routed(tiers: Sequence[TierOutcomes], like: Walk, promised: np.ndarray) -> Walk:
    """The same share of queries past the first tier as on another walk: the least promising, straight to the last.

    Args:
        tiers: Of the same queries.
        like: The walk whose rate is taken.
        promised: From :func:`promise`; among equals those that stand first go to the last tier. [Q]

    Raises:
        ShapeError: There is not one probability for each query.
    """
    check_tiers(tiers)
    if promised.shape != like.answered.shape:
        raise ShapeError(
            f"router: expected {like.answered.size} probabilities, got {list(promised.shape)}"
        )
    answered = np.zeros(like.answered.size, dtype=np.int64)
    past = int((like.answered > 0).sum())
    answered[np.argsort(promised, kind="stable")[:past]] = len(tiers) - 1
    return Walk(np.arange(len(tiers)) == answered[:, None], answered)
