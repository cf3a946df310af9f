import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedllm_flwr.averaging import RunningMean
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.privacy import ClippedMean, clip_factor, update_norm

SMALL = st.floats(-4, 4, width=32)


def quiet() -> np.random.Generator:
    return np.random.default_rng(0)


def two(first: list[float], second: list[float]) -> dict[str, np.ndarray]:
    return {"a": np.array(first, np.float32), "b": np.array(second, np.float32)}


def test_an_update_is_clipped_over_all_of_its_parts_and_from_the_start() -> None:
    start, values = two([1, 1], [5]), two([4, 1], [9])  # an update of (3, 0, 4), of norm 5
    assert update_norm(values, start) == 5
    mean = ClippedMean(start, 1.0)
    assert mean.add(values) == 5
    found = mean.result(1.0, 0.0, quiet())
    np.testing.assert_allclose(found["a"], [1.6, 1], rtol=1e-12)
    np.testing.assert_allclose(found["b"], [5.8], rtol=1e-12)
    assert (mean.count, mean.below) == (1, 0)


@pytest.mark.parametrize("clip_norm", [math.inf, 1e30])
def test_without_a_bound_and_noise_it_is_the_plain_mean_bit_for_bit(clip_norm: float) -> None:
    random = np.random.default_rng(1)
    start = random.standard_normal(1000).astype(np.float32)
    mean, plain = ClippedMean({"x": start}, clip_norm), RunningMean(1000)
    for _ in range(7):
        values = (start + random.standard_normal(1000)).astype(np.float32)
        mean.add({"x": values})
        plain.add(values, 1.0)
    found = mean.result(7.0, 0.0, quiet())["x"].astype(np.float32)
    np.testing.assert_array_equal(found, plain.result())


@given(
    updates=arrays(np.float32, (3, 4), elements=SMALL),
    start=arrays(np.float32, 4, elements=SMALL),
    clip_norm=st.floats(0.01, 5),
    expected=st.floats(0.5, 9),
)
def test_one_client_moves_the_mean_by_a_clip_norm_at_most(
    updates: np.ndarray, start: np.ndarray, clip_norm: float, expected: float
) -> None:
    def mean(clients: int) -> np.ndarray:
        total = ClippedMean({"x": start}, clip_norm)
        for update in updates[:clients]:
            total.add({"x": start + update})
        return total.result(expected, 0.0, quiet())["x"]

    moved = float(np.linalg.norm(mean(3) - mean(2)))
    assert moved <= clip_norm / expected * (1 + 1e-9) + 1e-12


def test_clients_that_do_not_answer_count_as_no_update() -> None:
    start = {"x": np.array([2.0], np.float32)}
    mean = ClippedMean(start, 10.0)
    mean.add({"x": np.array([6.0], np.float32)})
    assert mean.result(4.0, 0.0, quiet())["x"] == pytest.approx([3.0])
    more = ClippedMean(start, 10.0)  # coins gave three where two were expected
    for _ in range(3):
        more.add({"x": np.array([4.0], np.float32)})
    assert more.result(2.0, 0.0, quiet())["x"] == pytest.approx([5.0])
    nobody = ClippedMean(start, 10.0)
    assert nobody.result(2.5, 0.0, quiet())["x"] == pytest.approx([2.0])


def test_noise_has_the_deviation_that_the_account_rests_on_and_no_mean() -> None:
    start = {"x": np.zeros(40_000, np.float32), "y": np.zeros(40_000, np.float32)}
    found = ClippedMean(start, 3.0).result(4.0, 0.5, np.random.default_rng(2))
    noise = np.concatenate([found["x"], found["y"]])
    expected = 0.5 * 3.0 / 4.0
    assert noise.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 * expected / math.sqrt(noise.size)
    assert abs(np.corrcoef(found["x"], found["y"])[0, 1]) < 4 / math.sqrt(40_000)
    tails = np.mean(np.abs(noise) > 1.96 * expected)
    assert tails == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / noise.size))


def test_no_update_needs_no_clipping() -> None:
    assert clip_factor(0.0, 1.0) == 1.0
    assert clip_factor(2.0, 2.0) == 1.0
    assert clip_factor(4.0, 1.0) == 0.25


def test_what_does_not_fit_is_refused() -> None:
    start = {"x": np.zeros(2, np.float32)}
    mean = ClippedMean(start, 1.0)
    with pytest.raises(ShapeError, match=r"expected parts \{'x': \[2\]\}.*got \{'x': \[3\]\}"):
        mean.add({"x": np.zeros(3, np.float32)})
    with pytest.raises(ShapeError, match="got"):
        mean.add({"y": np.zeros(2, np.float32)})
    assert mean.count == 0
    for clip_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="expected clip_norm > 0, got"):
            ClippedMean(start, clip_norm)
    for expected, noise in ((0.0, 1.0), (1.0, -1.0), (math.inf, 0.0)):
        with pytest.raises(ConfigError, match="expected finite expected_clients > 0"):
            mean.result(expected, noise, quiet())
    with pytest.raises(ConfigError, match="expected a finite clip_norm where there is noise"):
        ClippedMean(start, math.inf).result(1.0, 1.0, quiet())


def test_an_update_as_long_as_the_clip_norm_counts_as_below() -> None:
    total = ClippedMean({"a": np.zeros(2, np.float32)}, 5.0)
    assert total.add({"a": np.array([3.0, 4.0], np.float32)}) == 5.0
    total.add({"a": np.array([6.0, 8.0], np.float32)})
    assert (total.below, total.count) == (1, 2)
