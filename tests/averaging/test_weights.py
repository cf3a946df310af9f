import pytest

from fedllm_flwr.averaging import client_weight
from fedllm_flwr.errors import ConfigError, WireError


def test_clients_count_by_their_examples_or_all_the_same():
    assert client_weight("examples", 64, client=3) == 64.0
    assert client_weight("uniform", 64, client=3) == 1.0


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("num_examples", [0, -2, float("nan"), float("inf")])
def test_a_client_without_a_proper_number_of_examples_is_named(weighting, num_examples):
    with pytest.raises(WireError, match="client 3: weight: expected a number above 0"):
        client_weight(weighting, num_examples, client=3)


def test_an_unknown_weighting_lists_the_known_ones():
    with pytest.raises(ConfigError, match="expected one of examples, uniform, got 'median'"):
        client_weight("median", 64, client=3)
