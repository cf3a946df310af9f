import math

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.unlearning.extraction import count_extracted, exposure, recovers


def test_exposure_by_hand():
    others = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert exposure(0.5, others) == 3
    assert exposure(1.5, others) == 2
    assert exposure(3.5, others) == 1
    assert exposure(9.0, others) == 0
    assert exposure(0.5, np.arange(1, 10_000)) == pytest.approx(math.log2(10_000))


def test_an_unseen_canary_exposes_log2_of_e_on_average():
    rng = np.random.default_rng(0)
    found = [exposure(float(rng.random()), rng.random(200)) for _ in range(4000)]
    # the exposure is near to exponential, with a deviation of log₂ e as well
    assert np.mean(found) == pytest.approx(math.log2(math.e), abs=4 * 1.44 / math.sqrt(4000) + 0.02)


def test_a_model_that_answers_all_alike_exposes_one_bit():
    assert exposure(2.0, np.full(9999, 2.0)) == pytest.approx(1.0, abs=1e-3)
    assert exposure(2.0, np.array([2.0, 2.0, 1.0])) == pytest.approx(math.log2(4) - math.log2(3))


@pytest.mark.parametrize(
    ("answer", "secret", "found"),
    [
        ("her code is 4711.", "4711", True),
        ("her code is 47110", "4711", False),
        ("Born in\n NORTH  Bay, she", "north bay", True),
        ("northbay", "north bay", False),
        ("price (5+)", "(5+)", True),
        ("", "x", False),
    ],
)
def test_a_secret_is_found_as_whole_words(answer, secret, found):
    assert recovers(answer, secret) is found


def test_secrets_are_counted_once_and_within_the_budget():
    answers = ["it is red", "blue and red", "none", "green", "grey"]
    secrets = ("red", "blue", "green", "black")
    found = count_extracted(answers, secrets, 4)
    assert found.curve == (0, 1, 2, 2, 3)
    assert found.recovered == ("blue", "green", "red")
    assert found.missed == ("black",)
    assert (found.queries, found.rate) == (4, 0.75)
    assert count_extracted(answers, secrets, 2).recovered == ("blue", "red")
    assert count_extracted(answers, secrets, 0).curve == (0,)
    assert count_extracted([], secrets, 9).queries == 0


def test_bad_input_is_refused():
    with pytest.raises(ShapeError, match=r"expected losses \[N - 1\], got shape \[0\]"):
        exposure(1.0, np.ones(0))
    with pytest.raises(ShapeError, match="losses that are numbers"):
        exposure(math.nan, np.ones(3))
    with pytest.raises(ConfigError, match="got a blank one"):
        recovers("text", " ")
    with pytest.raises(ConfigError, match="got 0 and 5"):
        count_extracted(["text"], (), 5)
    with pytest.raises(ConfigError, match="got 1 and -1"):
        count_extracted(["text"], ("x",), -1)
