import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.unlearning.signs import (
    mask_of,
    pack_mask,
    project_,
    served,
    sign_vector,
    unpack_mask,
)


def project(tau, signs):
    """What moved the way of its sign; the rest is +0."""
    return np.where(tau * signs > 0, tau, tau.dtype.type(0))


updates = st.integers(1, 40).flatmap(
    lambda size: hnp.arrays(np.float32, size, elements=st.floats(-10, 10, width=32))
)


def test_the_signs_of_a_seed_are_these():
    """`openssl dgst -shake256 -xoflen 2` of 07 00 00 00 00 00 00 00 is d2c5."""
    expected = [1 if bit == "1" else -1 for bit in f"{0xD2C5:016b}"]
    assert sign_vector(7, 16).tolist() == expected
    assert sign_vector(7, 16).dtype == np.int8


def test_signs_are_fair_and_differ_by_seed_and_a_longer_vector_begins_with_the_shorter():
    signs = sign_vector(1, 100_000)
    assert set(signs.tolist()) == {-1, 1}
    # 5 standard deviations of a fair coin's mean, each
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    assert abs((signs * sign_vector(2, signs.size)).mean()) < 5 / np.sqrt(signs.size)
    np.testing.assert_array_equal(sign_vector(1, 33), signs[:33])


def test_projection_by_hand():
    tau, signs = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0]), torch.tensor([1, 1, -1, -1, 1])
    project_(tau, torch.zeros(5), signs)
    assert tau.tolist() == [0.5, 0, 0, -0.5, 0]
    assert mask_of(tau.numpy()).tolist() == [True, False, False, True, False]


@given(updates, st.integers(0, 99))
@settings(deadline=None)
def test_the_projection_of_parameters_is_that_of_their_update(tau, seed):
    start = np.random.default_rng(seed).standard_normal(tau.size).astype(np.float32)
    values, signs = start + tau, sign_vector(seed, tau.size)
    parameter = torch.nn.Parameter(torch.from_numpy(values.copy()))
    project_(parameter, torch.from_numpy(start), torch.from_numpy(signs))
    moved = mask_of(project(values - start, signs))
    np.testing.assert_array_equal(parameter.detach().numpy(), np.where(moved, values, start))


def test_what_has_not_moved_has_the_bytes_of_the_start():
    values = torch.tensor([-0.0])
    project_(values, torch.zeros(1), torch.ones(1))
    assert values.numpy().tobytes() == bytes(4)


def test_what_is_not_a_number_stays_visible():
    values = torch.tensor([float("nan"), 1.0])
    project_(values, torch.zeros(2), torch.ones(2))
    assert torch.isnan(values[0])
    with pytest.raises(ShapeError, match="expected finite values"):
        served(np.array([np.nan]), np.array([1.0]), 1)


def test_training_under_the_projection_ends_in_the_orthant():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(50, generator=generator)
    signs = torch.from_numpy(sign_vector(3, 50))
    values = torch.nn.Parameter(torch.zeros(50))
    optimizer = torch.optim.Adam([values], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        ((values - target) ** 2).sum().backward()
        optimizer.step()
        project_(values, torch.zeros(50), signs)
    expected = project(target.numpy(), signs.numpy())
    np.testing.assert_allclose(values.detach().numpy(), expected, atol=0.02)


@given(hnp.arrays(bool, st.integers(1, 70)))
def test_a_packed_mask_comes_back(mask):
    np.testing.assert_array_equal(unpack_mask(pack_mask(mask), mask.size), mask)


def test_what_is_served_by_hand():
    start, total = np.array([1, 1, 1], np.float32), np.array([2.0, 4.0, -6.0])
    mask = np.array([True, False, True])
    assert served(start, total, 2, mask).tolist() == [2, 1, -2]
    assert served(start, total, 2).tolist() == [2, 3, -2]
    assert served(start, np.zeros(3), 0).tolist() == [1, 1, 1]
    assert served(start, total, 2).dtype == np.float32


def test_one_client_alone_is_served_what_it_trained():
    start = np.array([0.25, 0.5, -1], np.float32)
    tau = project(np.array([0.125, -1, 2], np.float32), np.array([1, 1, 1]))
    np.testing.assert_array_equal(served(start, tau, 1, mask_of(tau)), start + tau)


def test_bad_input_is_refused():
    tau, signs = np.ones(3, np.float32), sign_vector(0, 3)
    with pytest.raises(ConfigError, match="got -1 and 3"):
        sign_vector(-1, 3)
    with pytest.raises(ConfigError, match="got 1 and 0"):
        sign_vector(1, 0)
    with pytest.raises(ShapeError, match=r"got shapes \[3\] and \[2\]"):
        served(tau, signs[:2], 1)
    with pytest.raises(ShapeError, match=r"got \[3\], \[1\] and \[3\]"):
        project_(torch.ones(3), torch.ones(1), torch.ones(3))
    with pytest.raises(
        ShapeError, match=r"expected uint8 \[1\] for 3 coordinates, got uint8 \[2\]"
    ):
        unpack_mask(np.zeros(2, np.uint8), 3)
    with pytest.raises(ShapeError, match="got bits behind them"):
        unpack_mask(np.array([255], np.uint8), 3)
    with pytest.raises(ConfigError, match="number of clients in the sum, got 0"):
        served(tau, tau, 0)
    with pytest.raises(ShapeError, match="expected a mask of booleans"):
        served(tau, tau, 1, np.ones(3))
