import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError, DataError, ShapeError
from fedllm_flwr.reservoir import TOPOLOGIES, Reservoir, ReservoirSpec, energy_share
from fedllm_flwr.reservoir.network import BLOCK, draw_weights, spectral_radius

SPEC = ReservoirSpec(size=20, input_size=2, leak=0.6, density=0.3, bias=0.7, seed=5)


def contexts(batch: int, steps: int, width: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(seed))


def by_the_equation(reservoir: Reservoir, context: np.ndarray) -> np.ndarray:
    """The two lines of the definition, one context at a time in float64."""
    spec, x = reservoir.spec, np.zeros(reservoir.spec.size)
    leak = np.asarray(spec.leak)
    w, w_in = reservoir.weights.astype(float), reservoir.input_weights.astype(float)
    for u in context:
        x = (1 - leak) * x + leak * np.tanh(w_in @ np.r_[spec.bias, u] + w @ x)
    return np.r_[spec.bias, context[-1], x]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("leak", [1.0, 0.4, tuple(np.linspace(0.05, 1, 20))])
@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-13), ("float32", 2e-6)])
def test_states_are_those_of_the_equation(sparse, leak, precision, bound) -> None:
    reservoir = Reservoir(replace(SPEC, leak=leak), precision=precision, sparse=sparse)
    series = contexts(7, 11)
    z = reservoir.harvest(series)
    assert z.shape == (7, reservoir.spec.readout_size) == (7, 23)
    assert z.dtype == getattr(torch, precision)
    wanted = [by_the_equation(reservoir, context) for context in series.double().numpy()]
    np.testing.assert_allclose(z.numpy(), wanted, rtol=0, atol=bound)


def test_one_step_by_hand() -> None:
    """From the zero state, W plays no part: x = a tanh(W_in [b; u])."""
    reservoir = Reservoir(SPEC, precision="float64")
    w_in = reservoir.input_weights.astype(float)
    z = reservoir.harvest(torch.tensor([[[0.5, -1.0]]]))[0].numpy()
    np.testing.assert_allclose(z[:3], [0.7, 0.5, -1.0])
    np.testing.assert_allclose(z[3:], 0.6 * np.tanh(w_in @ [0.7, 0.5, -1.0]), atol=1e-15)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_context_s_state_depends_neither_on_its_batch_nor_on_what_is_before_it(
    lengths: list[int], sparse: bool
) -> None:
    reservoir = Reservoir(SPEC, precision="float64", sparse=sparse)
    series = contexts(len(lengths), 9)
    for row, length in zip(series, lengths, strict=True):
        row[: 9 - length] = math.nan
    together = reservoir.harvest(series, torch.tensor(lengths))
    for row, length, z in zip(series, lengths, together, strict=True):
        alone = reservoir.harvest(row[None, 9 - length :])[0]
        torch.testing.assert_close(z, alone, rtol=0, atol=1e-13)


def test_blocks_of_a_large_batch_are_put_together_in_order() -> None:
    reservoir = Reservoir(SPEC, precision="float64")
    count = 2 * BLOCK + 3
    series, lengths = contexts(count, 5), torch.arange(count) % 5 + 1
    z = reservoir.harvest(series, lengths)
    for place in (0, BLOCK - 1, BLOCK, count - 1):
        alone = reservoir.harvest(series[place : place + 1], lengths[place : place + 1])
        torch.testing.assert_close(z[place], alone[0], rtol=0, atol=1e-13)


def test_sparse_is_chosen_where_it_is_faster_and_changes_only_the_rounding() -> None:
    spec = ReservoirSpec(size=250, density=0.1)
    series = contexts(64, 30, 1)
    dense, chosen, sparse = (Reservoir(spec, sparse=s).harvest(series) for s in (False, None, True))
    torch.testing.assert_close(chosen, dense, rtol=0, atol=1e-5)
    assert torch.equal(chosen, sparse)
    one = Reservoir(spec).harvest(series[:1])
    assert torch.equal(one, Reservoir(spec, sparse=False).harvest(series[:1]))


def test_an_empty_batch_has_no_states() -> None:
    assert Reservoir(SPEC).harvest(torch.empty(0, 4, 2)).shape == (0, 23)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("radius", [0.5, 0.9, 1.2])
def test_the_spectral_radius_is_as_asked_for(topology, radius) -> None:
    """Eigenvalues of matrices that are not normal move by more than the float32 rounding of the entries."""
    weights, _ = draw_weights(
        ReservoirSpec(size=50, topology=topology, spectral_radius=radius, seed=1)
    )
    assert spectral_radius(weights) == pytest.approx(radius, rel=1e-5)
    assert not np.diag(weights).any()


def test_the_radius_of_a_rotation_is_1() -> None:
    """Power iteration would find nothing: both eigenvalues are complex and of the same size."""
    assert spectral_radius(np.array([[0.0, -1.0], [1.0, 0.0]])) == pytest.approx(1)


def test_below_radius_1_the_start_is_forgotten() -> None:
    """Echo state: two pasts that end in the same 200 values leave the same state, to rounding."""
    reservoir = Reservoir(replace(SPEC, leak=1.0), precision="float64")
    tail = 0.5 * contexts(1, 200)
    first, second = (
        reservoir.harvest(torch.cat([contexts(1, 5, seed=seed), tail], dim=1)) for seed in (1, 2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def test_input_weights_are_uniform_in_their_scale() -> None:
    _, inputs = draw_weights(
        ReservoirSpec(size=1000, input_size=4, input_scaling=0.5, density=0.01)
    )
    assert inputs.shape == (1000, 5)
    assert 0.499 < np.abs(inputs).max() <= 0.5
    assert inputs.var() == pytest.approx(0.25 / 3, rel=0.05)


def test_the_same_seed_gives_the_same_bits_in_another_process() -> None:
    code = (
        "from fedllm_flwr.reservoir import Reservoir, ReservoirSpec\n"
        "print(Reservoir(ReservoirSpec(size=64, seed=2**64 - 1)).fingerprint())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spec = ReservoirSpec(size=64, seed=2**64 - 1)
    draw_weights.cache_clear()
    assert found.stdout.strip() == Reservoir(spec).fingerprint()


def test_reservoirs_that_differ_have_other_fingerprints() -> None:
    others = (
        SPEC,
        replace(SPEC, seed=6),
        replace(SPEC, leak=0.5),
        replace(SPEC, leak=(0.6,) * 20),
        replace(SPEC, bias=0.8),
        replace(SPEC, topology="ring"),
        replace(SPEC, size=21),
        replace(SPEC, input_size=3),
        replace(SPEC, spectral_radius=0.8),
        replace(SPEC, input_scaling=0.9),
    )
    prints = {Reservoir(spec).fingerprint() for spec in others}
    assert len(prints) == len(others)
    assert all(len(found) == 16 for found in prints)
    double = Reservoir(SPEC, precision="float64", sparse=True)
    assert double.fingerprint() == Reservoir(SPEC).fingerprint()


def test_a_bit_of_a_weight_changes_the_fingerprint() -> None:
    reservoir = Reservoir(SPEC)
    before = reservoir.fingerprint()
    reservoir.weights = reservoir.weights.copy()
    reservoir.weights[3, 4] = np.nextafter(reservoir.weights[3, 4], np.float32(2))
    assert reservoir.fingerprint() != before


def test_drawn_weights_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Reservoir(SPEC).weights[0, 0] = 1


def test_energy_share_by_hand() -> None:
    """Mean (2, 0): deviations of squared length 1 + 1 over squared lengths 1 + 9."""
    assert energy_share(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(0.2)
    assert energy_share(torch.tensor([[1.0, 2.0], [1.0, 2.0]])) == 0
    assert energy_share(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(1)
    with pytest.raises(ShapeError, match=r"at least 2 states, got shape \[1, 2\]"):
        energy_share(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("series", "lengths", "error", "message"),
    [
        (torch.zeros(2, 0, 2), None, DataError, "at least one step, got none"),
        (torch.zeros(2, 3, 1), None, ShapeError, r"\[contexts, steps, 2\], got \[2, 3, 1\]"),
        (torch.zeros(3, 2), None, ShapeError, r"\[contexts, steps, 2\], got \[3, 2\]"),
        (torch.zeros(2, 3, 2), torch.tensor([1]), ShapeError, r"shape \[2\], got \[1\]"),
        (torch.zeros(2, 3, 2), torch.tensor([3, 0]), DataError, "context 1: expected 1 to 3.*0"),
        (torch.zeros(2, 3, 2), torch.tensor([4, 3]), DataError, "context 0: expected 1 to 3.*4"),
    ],
)
def test_bad_contexts_are_refused(series, lengths, error, message) -> None:
    with pytest.raises(error, match=message):
        Reservoir(SPEC).harvest(series, lengths)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(value: float) -> None:
    series = contexts(4, 6)
    series[2, 3, 1] = value
    with pytest.raises(DataError, match="context 2: expected finite values"):
        Reservoir(SPEC).harvest(series)
    with pytest.raises(DataError, match="context 2: expected finite values"):
        Reservoir(SPEC).harvest(series, torch.tensor([1, 2, 3, 6]))
    assert Reservoir(SPEC).harvest(series, torch.tensor([6, 6, 2, 6])).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 1}, "size: expected 2 to 2000 nodes, got 1"),
        ({"size": 2001}, "size: .* got 2001"),
        ({"input_size": 0}, "input_size: expected at least 1, got 0"),
        ({"leak": 0.0}, r"leak: expected in \(0, 1\], got 0.0"),
        ({"leak": (0.5, 0.5)}, "leak: expected 1 or 20 values, got 2"),
        ({"leak": (*(0.5,) * 19, 1.5)}, "leak: expected in"),
        ({"spectral_radius": 0.0}, "spectral_radius: expected > 0"),
        ({"spectral_radius": math.inf}, "spectral_radius: expected > 0"),
        ({"input_scaling": -1.0}, "input_scaling: expected > 0"),
        ({"density": 0.0}, "density: expected in"),
        ({"density": 1.5}, "density: expected in"),
        ({"topology": "star"}, "topology: expected erdos_renyi, .* got star"),
        ({"bias": math.nan}, "bias: expected a finite number, got nan"),
        ({"seed": -1}, "seed: expected 8 bytes, >= 0, got -1"),
        ({"seed": 2**64}, "seed: expected 8 bytes"),
    ],
)
def test_settings_out_of_range_are_refused(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SPEC, **change)


def test_a_graph_without_a_cycle_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a graph with a cycle, got spectral radius 0"):
        Reservoir(ReservoirSpec(size=4, density=0.01))
