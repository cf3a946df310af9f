"""A frozen leaky-integrator reservoir: one context in, one state out; the same bits from 8 bytes of seed.

    x(t) = (1 - a) x(t-1) + a tanh(W_in [b_c; u(t)] + W x(t-1)),   x(0) = 0
    z    = [b_c; u(T); x(T)]

Axes: B contexts, T steps, n_in values of a step, N nodes, R = 1 + n_in + N values of z.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError, DataError, ShapeError
from fedllm_flwr.reservoir.topology import TOPOLOGIES, Topology
from fedllm_flwr.seeding import numpy_generator

LARGEST = 2000
"""Nodes up to which a dense eigensolve is a matter of seconds."""

SPARSE_SHARE, SPARSE_NODES, SPARSE_BATCH, SPARSE_STATES = 0.12, 200, 8, 3000
"""Where sparse products are faster, measured on one core: up to this share of weights that are not 0, and from so many
nodes, contexts, and states N B on."""

BLOCK = 128
"""Contexts that step together: their states stay in the cache of a core."""

Precision = Literal["float32", "float64"]
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ReservoirSpec:
    """All that two parties must share to have the same reservoir.

    Attributes:
        size: Nodes N, in [2, ``LARGEST``].
        input_size: Values of a step, n_in, at least 1.
        leak: a, in (0, 1]; one for all nodes or one for each.
        spectral_radius: Largest |eigenvalue| of W, > 0.
        input_scaling: Input weights are U(-1, 1) times this, > 0.
        density: Share of the possible edges, in (0, 1]; a ring has N whatever it is.
        topology: A key of ``TOPOLOGIES``.
        bias: b_c, finite.
        seed: 8 bytes, in [0, 2**64).

    Raises:
        ConfigError: A value is out of range.
    """

    size: int = 200
    input_size: int = 1
    leak: float | tuple[float, ...] = 1.0
    spectral_radius: float = 0.9
    input_scaling: float = 1.0
    density: float = 0.1
    topology: Topology = "erdos_renyi"
    bias: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        leaks = self.leaks
        checks = (
            ("size", 2 <= self.size <= LARGEST, f"2 to {LARGEST} nodes", self.size),
            ("input_size", self.input_size >= 1, "at least 1", self.input_size),
            ("leak", len(leaks) in (1, self.size), f"1 or {self.size} values", f"{len(leaks)}"),
            ("leak", all(0 < leak <= 1 for leak in leaks), "in (0, 1]", self.leak),
            ("spectral_radius", 0 < self.spectral_radius < math.inf, "> 0", self.spectral_radius),
            ("input_scaling", 0 < self.input_scaling < math.inf, "> 0", self.input_scaling),
            ("density", 0 < self.density <= 1, "in (0, 1]", self.density),
            ("topology", self.topology in TOPOLOGIES, ", ".join(TOPOLOGIES), self.topology),
            ("bias", math.isfinite(self.bias), "a finite number", self.bias),
            ("seed", 0 <= self.seed < 2**64, "8 bytes, >= 0", self.seed),
        )
        for name, met, expected, got in checks:
            if not met:
                raise ConfigError(f"reservoir {name}: expected {expected}, got {got}")

    @property
    def leaks(self) -> tuple[float, ...]:
        """The leak as one value or N."""
        return self.leak if isinstance(self.leak, tuple) else (self.leak,)

    @property
    def readout_size(self) -> int:
        """Values of z: R = 1 + n_in + N."""
        return 1 + self.input_size + self.size


@lru_cache(maxsize=8)
def draw_weights(spec: ReservoirSpec) -> tuple[np.ndarray, np.ndarray]:
    """The frozen weights of a reservoir.

    The spectral radius is rounded to float32 before W is divided by it. LAPACK libraries agree to about 1e-12, so that
    all but some hundred-thousandths of the reservoirs have the same bits on all machines; `Reservoir.fingerprint` finds
    the others.

    Args:
        spec: What to draw.

    Returns:
        W [N, N] and W_in [N, 1 + n_in], float32, read only; column 0 of W_in is for the bias.

    Raises:
        ConfigError: The graph has no cycle, so that no factor gives W the spectral radius.
    """
    random = numpy_generator(spec.seed, "reservoir", spec.topology)
    drawn = TOPOLOGIES[spec.topology](spec.size, spec.density, random)
    radius = np.float32(spectral_radius(drawn))
    if not radius:
        raise ConfigError(
            f"reservoir of {spec.size} nodes, density {spec.density:g}: expected a graph with a "
            "cycle, got spectral radius 0; raise the density or the size"
        )
    recurrent = (drawn * (spec.spectral_radius / np.float64(radius))).astype(np.float32)
    random = numpy_generator(spec.seed, "reservoir", "input")
    shape = (spec.size, 1 + spec.input_size)
    inputs = (spec.input_scaling * random.uniform(-1.0, 1.0, shape)).astype(np.float32)
    recurrent.flags.writeable = inputs.flags.writeable = False
    return recurrent, inputs


def spectral_radius(weights: np.ndarray) -> float:
    """Largest absolute eigenvalue of a square matrix, by a dense eigensolve in float64."""
    return float(np.abs(np.linalg.eigvals(weights.astype(np.float64))).max())


class Reservoir:
    """The echo-state network of a spec, for batches of contexts on the CPU.

    One step is one product of [N, R] and [R, B] with the input's and the bias' weights beside W, in NumPy: its float32
    tanh is several times faster than torch's there, which else costs as much as the products. Large sparse graphs
    multiply through torch's compressed rows.

    Args:
        spec: The reservoir.
        precision: Of the states; the weights are the float32 ones in either.
        sparse: Whether W is multiplied as a sparse matrix; None for whatever is faster.

    Raises:
        ConfigError: The graph has no cycle.

    Source:
        Jaeger et al. 2007, Optimization and applications of echo state networks with leaky-integrator neurons, eq. 2
        with γ = a. No washout, as only the last state is used.
    """

    def __init__(
        self,
        spec: ReservoirSpec,
        *,
        precision: Precision = "float32",
        sparse: bool | None = None,
    ) -> None:
        self.spec = spec
        self.weights, self.input_weights = draw_weights(spec)
        self._dtype = np.dtype(precision)
        self._joint = np.hstack([self.weights, self.input_weights]).astype(self._dtype)
        self._leak = np.array(spec.leaks, dtype=self._dtype)[:, None]
        few = np.count_nonzero(self.weights) <= SPARSE_SHARE * self.weights.size
        self._sparse = sparse
        self._rows = _compressed(self._joint) if sparse or (sparse is None and few) else None

    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ between reservoirs whose settings or weights' bits differ."""
        digest = hashlib.sha256(repr(astuple(self.spec)).encode())
        for weights in (self.weights, self.input_weights):
            digest.update(weights.astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def harvest(self, series: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The last states of a batch of contexts, each from the zero state.

        Args:
            series: The contexts, of any float type. [B, T, n_in]
            lengths: Steps of each context, int64 in [1, T]: its values are the last ones of its row and what comes
                before them is not read. None if all have T. [B]

        Returns:
            z in the reservoir's precision, on the CPU. [B, R]

        Raises:
            ShapeError: The series or the lengths have another shape.
            DataError: A context has less than one step or a value that is not finite; names the context.
        """
        steps = self._checked(series)
        counts = _checked_lengths(lengths, *steps.shape[:2])
        # Longest first: the contexts that have begun are then the first columns.
        order = np.argsort(-counts, kind="stable")
        steps, counts = steps[order], counts[order]
        begins = steps.shape[1] - counts
        read = np.arange(steps.shape[1]) >= begins[:, None]
        broken = (~np.isfinite(steps).all(axis=2) & read).any(axis=1)
        if broken.any():
            context = order[broken].min()
            raise DataError(f"context {context}: expected finite values, got NaN or infinity")
        z = np.empty((len(steps), self.spec.readout_size), dtype=self._dtype)
        for start in range(0, len(steps), BLOCK):
            block = slice(start, start + BLOCK)
            columns = np.ascontiguousarray(steps[block].transpose(1, 2, 0))
            z[order[block]] = self._run(columns, begins[block])
        return torch.from_numpy(z)

    def _checked(self, series: Tensor) -> np.ndarray:
        """The series as an array of the reservoir's precision."""
        width = self.spec.input_size
        if series.ndim != 3 or series.shape[2] != width:
            raise ShapeError(
                f"contexts: expected shape [contexts, steps, {width}], got {list(series.shape)}"
            )
        if not series.shape[1]:
            raise DataError("contexts: expected at least one step, got none")
        steps: np.ndarray = series.detach().cpu().to(PRECISIONS[self._dtype.name]).numpy()
        return steps

    def _run(self, steps: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """From steps [T, n_in, B] and each context's first step [B], which rises, to z [B, R]."""
        nodes, (total, _, batch) = self.spec.size, steps.shape
        columns = np.zeros((nodes + 1 + self.spec.input_size, batch), dtype=self._dtype)
        columns[nodes] = self.spec.bias
        state, after = columns[:nodes], np.empty((nodes, batch), dtype=self._dtype)
        for first, end in pairwise([*np.unique(begins).tolist(), total]):
            begun = int(np.searchsorted(begins, first, side="right"))
            x, new, inputs = state[:, :begun], after[:, :begun], columns[nodes + 1 :, :begun]
            multiply = self._product(columns[:, :begun], new)
            for step in range(first, end):
                inputs[...] = steps[step, :, :begun]
                multiply()
                np.tanh(new, out=new)
                new -= x
                new *= self._leak
                x += new
        return np.concatenate([columns[nodes:], state]).T

    def _product(self, columns: np.ndarray, out: np.ndarray) -> Callable[[], object]:
        """Writes the pre-activations of all nodes [N, b] from columns [R, b], as they are when it is called."""
        nodes, batch = out.shape
        large = nodes >= SPARSE_NODES and batch >= SPARSE_BATCH and nodes * batch >= SPARSE_STATES
        if self._rows is not None and (self._sparse or large):
            right, result = torch.from_numpy(columns), torch.from_numpy(out)
            return partial(torch.mm, self._rows, right, out=result)
        return partial(np.matmul, self._joint, columns, out=out)


def energy_share(z: Tensor) -> float:
    """Share of the states' squared norm that varies with the input: Σ‖z_b - mean‖² / Σ‖z_b‖².

    Args:
        z: States of different contexts, not all 0. [B, R]

    Returns:
        In [0, 1]; 0 if no context makes a difference.

    Raises:
        ShapeError: There are fewer than two states.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ShapeError(f"energy share: expected at least 2 states, got shape {list(z.shape)}")
    wide = z.double()
    return float((wide - wide.mean(0)).square().sum() / wide.square().sum())


def _checked_lengths(lengths: Tensor | None, batch: int, total: int) -> np.ndarray:
    if lengths is None:
        return np.full(batch, total)
    if tuple(lengths.shape) != (batch,):
        raise ShapeError(f"lengths: expected shape [{batch}], got {list(lengths.shape)}")
    counts: np.ndarray = lengths.cpu().numpy()
    for context, count in enumerate(counts):
        if not 1 <= count <= total:
            raise DataError(f"context {context}: expected 1 to {total} steps, got {count}")
    return counts


def _compressed(dense: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.from_numpy(dense).to_sparse_csr()
