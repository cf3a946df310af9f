import numpy as np
import pytest

from fedllm_flwr.batching.accounts import throughput_ceiling
from fedllm_flwr.batching.arrivals import poisson_arrivals, serve_arrivals
from fedllm_flwr.errors import ConfigError


def test_a_request_alone_waits_its_wait_and_its_batch() -> None:
    found = serve_arrivals(np.array([0.0, 10.0]), lambda size: 0.5, max_wait_seconds=0.1)
    assert found.seconds.tolist() == pytest.approx([0.6, 0.6])
    assert found.sizes == (1, 1)


def test_by_hand() -> None:
    """Two begin together when the second is there; the third comes during their batch, and its wait is over then."""
    arrivals = np.array([0.0, 0.05, 0.2, 0.21, 5.0])
    found = serve_arrivals(arrivals, lambda size: 1.0 * size, max_batch=2, max_wait_seconds=0.1)
    assert found.sizes == (2, 2, 1)
    assert found.seconds.tolist() == pytest.approx([2.05, 2.0, 3.85, 3.84, 1.1])
    assert found.until == pytest.approx(6.1)


def test_a_full_batch_does_not_wait() -> None:
    found = serve_arrivals(np.zeros(4), lambda size: 1.0, max_batch=4, max_wait_seconds=9.0)
    assert found.seconds.tolist() == [1.0] * 4


@pytest.mark.parametrize("rate", [20.0, 200.0])
def test_below_the_ceiling_the_queue_stays_short_and_beyond_it_grows(rate: float) -> None:
    """32 requests in 0.32 s make 100 a second at most."""
    ceiling = throughput_ceiling(32, 0.32)
    arrivals = poisson_arrivals(rate, 2000, np.random.default_rng(0))
    found = serve_arrivals(arrivals, lambda size: 0.01 * size)
    assert sum(found.sizes) == 2000
    assert max(found.sizes) <= 32
    answered = 2000 / found.until
    if rate < ceiling:
        assert found.percentiles["p99"] < 1.0
        assert answered == pytest.approx(rate, rel=0.1)
    else:
        assert found.percentiles["p50"] > 4.0
        assert answered == pytest.approx(ceiling, rel=0.02)
    assert found.percentiles["p50"] <= found.percentiles["p95"] <= found.percentiles["p99"]


def test_arrivals_are_poissons() -> None:
    gaps = np.diff(poisson_arrivals(50.0, 20_000, np.random.default_rng(1)), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03), (
        "exponential: deviation and mean are equal"
    )


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="a rate above 0"):
        poisson_arrivals(0.0, 5, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="max_batch >= 1"):
        serve_arrivals(np.zeros(1), lambda size: 1.0, max_batch=0)
    for wrong in (np.zeros(0), np.array([1.0, 0.0])):
        with pytest.raises(ConfigError, match="ascending times"):
            serve_arrivals(wrong, lambda size: 1.0)
