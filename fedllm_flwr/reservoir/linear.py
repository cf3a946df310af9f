"""What a linear classifier makes of reservoir states, without any language model: the least that a split must beat.

Axes: n rows, R values of a state.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedllm_flwr.errors import ConfigError

INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
ITERATIONS = 2000


def logistic_on_states(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    tests: Sequence[np.ndarray],
) -> tuple[list[np.ndarray], float]:
    """Multinomial logistic regression on standardised states.

    Args:
        train: States [n, R] and classes [n] of at least two kinds.
        validation: The same, on which the penalty is chosen; ties, and no rows, go to the stronger one.
        tests: States of each client, [n, R].

    Returns:
        The predicted classes of each client's rows, and the inverse penalty that was chosen.

    Raises:
        ConfigError: The training rows are all of one class.

    Source:
        Cox 1958, The regression analysis of binary sequences, with an L2 penalty.
    """
    states, classes = train
    if len(np.unique(classes)) < 2:
        raise ConfigError(
            f"logistic regression on states: expected rows of at least two classes, got {len(classes)} of one"
        )
    best, best_right, chosen = None, -1, INVERSE_PENALTIES[0]
    for inverse in INVERSE_PENALTIES if len(validation[1]) else INVERSE_PENALTIES[:1]:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=inverse, max_iter=ITERATIONS)
        ).fit(states, classes)
        right = (
            int((model.predict(validation[0]) == validation[1]).sum()) if len(validation[1]) else 0
        )
        if right > best_right:
            best, best_right, chosen = model, right, inverse
    assert best is not None  # noqa: S101  # there is a penalty to try
    return [best.predict(own) if len(own) else np.empty(0, np.int64) for own in tests], chosen
