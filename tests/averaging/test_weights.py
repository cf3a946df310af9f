import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.averaging import client_weight, shares
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


def test_shares_by_hand():
    assert shares({0: 1, 4: 3, 2: 4}) == {0: 0.125, 4: 0.375, 2: 0.5}


@given(st.dictionaries(st.integers(0, 99), st.floats(1e-6, 1e6), min_size=1))
@settings(deadline=None)
def test_shares_sum_to_one_and_keep_the_order_of_clients(weights):
    result = shares(weights)
    assert list(result) == list(weights)
    assert sum(result.values()) == pytest.approx(1, abs=1e-12)


def test_shares_refuse_a_bad_weight_and_a_zero_total():
    with pytest.raises(WireError, match=r"client 4: weight: .*got -3"):
        shares({0: 1, 4: -3})
    with pytest.raises(WireError, match=r"got none \(the total weight is 0\)"):
        shares({})
