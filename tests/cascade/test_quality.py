import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.cascade.quality import bootstrapped_gain, chr_f, quality_gain
from fedllm_flwr.errors import ShapeError

TEXTS = st.text(alphabet="ab c", max_size=12)


def test_chr_f_by_hand() -> None:
    """'abc' and 'abd': 1-grams 2 of 3, 2-grams 1 of 2, 3-grams 0 of 1, for precision and recall alike."""
    assert chr_f("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # 'ab' against 'abcd': precision (2/2 + 1/1) / 2, recall (2/4 + 1/3) / 2, orders 1 and 2 only
    precision, recall = 1.0, (1 / 2 + 1 / 3) / 2
    assert chr_f("ab", "abcd") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chr_f("a b", "ab") == 1.0
    assert chr_f(None, "ab") == chr_f("", "ab") == chr_f("xy", "ab") == 0.0


@given(TEXTS, TEXTS)
def test_chr_f_is_a_share_and_1_for_equal_texts(one: str, other: str) -> None:
    assert 0 <= chr_f(one, other) <= 1
    if "".join(one.split()):
        assert chr_f(one, one) == pytest.approx(1.0)


def test_recall_counts_more_than_precision() -> None:
    assert chr_f("abcdxxxx", "abcd") > chr_f("abcd", "abcdxxxx")


@pytest.mark.parametrize("seed", range(4))
def test_a_signal_is_worth_1_if_perfect_0_if_constant_and_minus_if_reversed(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, last = random.random(40), random.random(40)
    assert quality_gain(first - last, first, last) == pytest.approx(1.0)
    assert quality_gain(np.ones(40), first, last) == pytest.approx(0.0)
    assert quality_gain(last - first, first, last) < -0.5
    noisy = quality_gain(first - last + random.normal(0, 0.3, 40), first, last)
    assert 0 < noisy < 1


def test_the_area_by_hand() -> None:
    """Gains 1, 0, 0 for the queries; the right one is deferred second: areas 1.5, 2.5 and 1.5 of random."""
    first, last = np.array([0.0, 0.5, 0.5]), np.array([1.0, 0.5, 0.5])
    # found: 0, 0, 1, 1 -> 1.5; perfect: 0, 1, 1, 1 -> 2.5; random: 0, 1/3, 2/3, 1 -> 1.5
    assert quality_gain(np.array([2.0, 1.0, 3.0]), first, last) == pytest.approx(0.0)
    assert quality_gain(np.array([1.0, 2.0, 3.0]), first, last) == pytest.approx(1.0)


def test_intervals_hold_the_value_and_shrink_with_queries() -> None:
    random = np.random.default_rng(0)
    widths = []
    for queries in (50, 400):
        first, last = random.random(queries), random.random(queries)
        levels = first - last + random.normal(0, 0.5, queries)
        found = bootstrapped_gain(levels, first, last, np.random.default_rng(1))
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 1.5


def test_where_no_order_is_better_there_is_no_gain() -> None:
    same = np.full(5, 0.5)
    found = bootstrapped_gain(np.arange(5.0), same, same, np.random.default_rng(0))
    assert np.isnan([found.value, found.low, found.high]).all()
    with pytest.raises(ShapeError, match="levels and qualities of one length"):
        quality_gain(np.ones(2), np.ones(3), np.ones(3))
