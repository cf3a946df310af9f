import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.reservoir.linear import logistic_on_states


def blobs(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that a line can tell apart, on scales that differ a millionfold."""
    random = np.random.default_rng(seed)
    classes = np.arange(rows) % 3
    states = random.normal(size=(rows, 4)) * 0.1
    states[np.arange(rows), classes] += 2
    return states * [1e-3, 1, 1e3, 1], classes


def test_classes_that_a_line_separates_are_found() -> None:
    tests = [blobs(30, 2), blobs(9, 3)]
    predicted, _ = logistic_on_states(blobs(60, 0), blobs(30, 1), [states for states, _ in tests])
    for own, (_, classes) in zip(predicted, tests, strict=True):
        assert own.dtype == np.int64
        np.testing.assert_array_equal(own, classes)


def test_states_that_know_nothing_are_at_chance() -> None:
    random = np.random.default_rng(0)
    _, classes = blobs(300, 0)
    noise = [random.normal(size=(300, 4)) for _ in range(3)]
    [predicted], _ = logistic_on_states((noise[0], classes), (noise[1], classes), [noise[2]])
    assert abs((predicted == classes).mean() - 1 / 3) < 0.1


def test_the_penalty_is_the_one_that_is_best_on_validation_rows() -> None:
    """One class is rare, so a strong penalty leaves it out, and validation rows of it ask for a weak one."""
    states, classes = blobs(300, 0)
    kept = (classes != 2) | (np.arange(300) < 6)
    train = (states[kept], classes[kept])
    rare = classes == 2
    _, inverse = logistic_on_states(train, (states[rare], classes[rare]), [])
    assert inverse > 0.01
    assert logistic_on_states(train, (states[:0], classes[:0]), [])[1] == 0.01
    easy = (states[classes == 0], classes[classes == 0])
    assert logistic_on_states(train, easy, [])[1] == 0.01, "a tie goes to the stronger penalty"


def test_clients_without_rows_have_no_predictions() -> None:
    [none], _ = logistic_on_states(blobs(30, 0), blobs(9, 1), [np.empty((0, 4))])
    assert none.shape == (0,)


def test_one_class_is_refused() -> None:
    states, _ = blobs(9, 0)
    with pytest.raises(ConfigError, match="expected rows of at least two classes, got 9 of one"):
        logistic_on_states((states, np.zeros(9, np.int64)), (states, np.zeros(9, np.int64)), [])
