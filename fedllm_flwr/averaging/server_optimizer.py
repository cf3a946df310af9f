"""Server optimizers: what the server does with the mean of its clients' parameters.

All take the step Δ = mean of clients - current, or its opposite g = -Δ, the pseudo-gradient. Parameters and moments are
float32 arrays by name; a step is computed in float64 and rounded once. Everything is state in, state out, so that a
state written to a checkpoint and read back goes on with the same bits.

These are our own, and equal to Flower's classes of the same names: Flower's average whole replies of equal shape
inside the step (so exact LoRA means, mixed ranks and codecs cannot come before it) and keep moments where no
checkpoint sees them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError, WireError

Params = Mapping[str, np.ndarray]
Moments = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class State:
    """What a server optimizer remembers between rounds.

    Attributes:
        server_round: The last round applied; 0 before the first.
        moments: By moment name (for example ``momentum``), then by parameter name: float32 arrays.
    """

    server_round: int
    moments: Mapping[str, Params]

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state as arrays for a checkpoint: ``server_round`` and ``<moment>/<parameter>``."""
        named = {
            f"{moment}/{name}": values
            for moment, by_name in self.moments.items()
            for name, values in by_name.items()
        }
        return {"server_round": np.array(self.server_round, dtype=np.int64), **named}

    @classmethod
    def from_arrays(cls, arrays: Params) -> Self:
        """Read back what `arrays` wrote.

        Raises:
            WireError: ``server_round`` is missing, or a name is not of the form ``<moment>/<parameter>``.
        """
        moments: dict[str, dict[str, np.ndarray]] = {}
        for key, values in arrays.items():
            moment, slash, name = key.partition("/")
            if slash:
                moments.setdefault(moment, {})[name] = values
            elif key != "server_round":
                raise WireError(f"optimizer state: expected <moment>/<parameter>, got {key!r}")
        if "server_round" not in arrays:
            raise WireError("optimizer state: expected server_round, got none")
        return cls(int(arrays["server_round"]), moments)


class ServerOptimizer(ABC):
    """Turns the current parameters and the mean of the clients' into the next parameters."""

    moment_names: ClassVar[tuple[str, ...]] = ()

    def init(self, params: Params) -> State:
        """The state before the first round: moments of zeros.

        Args:
            params: Parameters by name; only names and shapes are used.
        """
        zeros = {name: np.zeros(values.shape, np.float32) for name, values in params.items()}
        return State(0, dict.fromkeys(self.moment_names, zeros))

    def apply(
        self, state: State, current: Params, mean_of_clients: Params, server_round: int
    ) -> tuple[State, dict[str, np.ndarray]]:
        """One step.

        Args:
            state: From `init` or the step before; not changed.
            current: The parameters that the clients started from; not changed.
            mean_of_clients: The weighted mean of the parameters they came back with; not changed.
            server_round: This round, counted from 1; rounds without a step may be left out.

        Returns:
            The next state and the next parameters, float32.

        Raises:
            ShapeError: Names or shapes differ between the current parameters, the mean and the state.
            ValueError: A step of this or a later round was already applied, as after a resume gone wrong.
        """
        if server_round <= state.server_round:
            raise ValueError(f"expected a round after {state.server_round}, got {server_round}")
        self._check(state, current, mean_of_clients)
        moments: dict[str, dict[str, np.ndarray]] = {moment: {} for moment in self.moment_names}
        params = {}
        for name, values in current.items():
            past = {moment: _wide(state.moments[moment][name]) for moment in self.moment_names}
            new, value = self._step(_wide(values), _wide(mean_of_clients[name]), past, server_round)
            params[name] = value.astype(np.float32)
            for moment in self.moment_names:
                moments[moment][name] = new[moment].astype(np.float32)
        return State(server_round, moments), params

    @abstractmethod
    def _step(
        self, current: np.ndarray, mean: np.ndarray, moments: Moments, server_round: int
    ) -> tuple[Moments, np.ndarray]:
        """One array's step in float64.

        Args:
            current: The parameter that the clients started from, any shape.
            mean: The mean of the clients', of the same shape.
            moments: This parameter's moments by name, of the same shape.
            server_round: This round, counted from 1.

        Returns:
            The new moments and the new parameter.
        """

    def _check(self, state: State, current: Params, mean_of_clients: Params) -> None:
        held = {f"state {moment}": state.moments.get(moment, {}) for moment in self.moment_names}
        for holder, arrays in {"mean of clients": mean_of_clients, **held}.items():
            if arrays.keys() != current.keys():
                raise ShapeError(
                    f"{holder}: expected arrays {sorted(current)}, got {sorted(arrays)}"
                )
            for name, values in current.items():
                if arrays[name].shape != values.shape:
                    raise ShapeError(
                        f"{holder}, {name}: expected {values.shape}, got {arrays[name].shape}"
                    )


@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """The next parameters are the mean of the clients'.

    Source:
        McMahan et al. 2017, Algorithm 1.
    """

    def _step(
        self, current: np.ndarray, mean: np.ndarray, moments: Moments, server_round: int
    ) -> tuple[Moments, np.ndarray]:
        return {}, mean


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Heavy-ball momentum on the pseudo-gradient: v ← β v + g, x ← x - η v.

    Attributes:
        learning_rate: η > 0.
        momentum: β in [0, 1).

    Source:
        Hsu et al. 2019 (FedAvgM, arXiv 1909.06335). Equals Flower's `FedAvgM`, whose default β is 0; ours is 0.9.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9
    moment_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        _check_ranges(self)

    def _step(
        self, current: np.ndarray, mean: np.ndarray, moments: Moments, server_round: int
    ) -> tuple[Moments, np.ndarray]:
        velocity = self.momentum * moments["momentum"] + (current - mean)
        return {"momentum": velocity}, current - self.learning_rate * velocity


@dataclass(frozen=True)
class DiLoCo(FedAvgM):
    """Nesterov momentum on the pseudo-gradient: v ← β v + g, x ← x - η (g + β v).

    Attributes:
        learning_rate: Outer η > 0.
        momentum: Outer β in [0, 1).

    Source:
        Douillard et al. 2023 (DiLoCo, arXiv 2311.08105), Algorithm 1, outer step with the paper's η and β. The form is
        that of `torch.optim.SGD(nesterov=True)`. Differs in that clients count by their weights instead of 1 / k.
    """

    learning_rate: float = 0.7

    def _step(
        self, current: np.ndarray, mean: np.ndarray, moments: Moments, server_round: int
    ) -> tuple[Moments, np.ndarray]:
        gradient = current - mean
        velocity = self.momentum * moments["momentum"] + gradient
        step = gradient + self.momentum * velocity
        return {"momentum": velocity}, current - self.learning_rate * step


@dataclass(frozen=True)
class FedAdagrad(ServerOptimizer):
    """Steps shrink with all squares seen: v ← v + Δ², x ← x + η Δ / (√v + τ).

    Attributes:
        learning_rate: η > 0.
        tau: τ > 0, the degree of adaptivity: the smaller, the more every coordinate steps alike.

    Source:
        Reddi et al. 2021, Algorithm 2 (FedAdagrad) with β₁ = 0. Equals Flower's `FedAdagrad`; like it, v starts at 0
        where the paper has τ² or more.
    """

    learning_rate: float = 0.1
    tau: float = 1e-3
    moment_names: ClassVar[tuple[str, ...]] = ("second_moment",)

    def __post_init__(self) -> None:
        _check_ranges(self)

    def _step(
        self, current: np.ndarray, mean: np.ndarray, moments: Moments, server_round: int
    ) -> tuple[Moments, np.ndarray]:
        delta = mean - current
        second = moments["second_moment"] + delta**2
        new = current + self.learning_rate * delta / (np.sqrt(second) + self.tau)
        return {"second_moment": second}, new


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    """Adam on the step: m ← β₁ m + (1 - β₁) Δ, v ← β₂ v + (1 - β₂) Δ², x ← x + ηₜ m / (√v + τ).

    Attributes:
        learning_rate: η > 0; ηₜ = η √(1 - β₂ᵗ) / (1 - β₁ᵗ).
        beta_1: β₁ in [0, 1).
        beta_2: β₂ in [0, 1).
        tau: τ > 0, the degree of adaptivity.

    Source:
        Reddi et al. 2021, Algorithm 2 (FedAdam). Equals Flower's `FedAdam`: v starts at 0, and there is a bias
        correction (Kingma and Ba 2015, end of section 2), where the paper has neither. As in Flower, t is the round
        plus one, so the first step is corrected as Adam's second.
    """

    learning_rate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    moment_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def __post_init__(self) -> None:
        _check_ranges(self)

    def _step(
        self, current: np.ndarray, mean: np.ndarray, moments: Moments, server_round: int
    ) -> tuple[Moments, np.ndarray]:
        delta = mean - current
        first = self.beta_1 * moments["first_moment"] + (1 - self.beta_1) * delta
        second = self._second_moment(moments["second_moment"], delta**2)
        rate = self._rate(server_round)
        new = current + rate * first / (np.sqrt(second) + self.tau)
        return {"first_moment": first, "second_moment": second}, new

    def _second_moment(self, past: np.ndarray, square: np.ndarray) -> np.ndarray:
        """The next v from the last one and Δ²."""
        return self.beta_2 * past + (1 - self.beta_2) * square

    def _rate(self, server_round: int) -> float:
        """The bias-corrected learning rate ηₜ of a round, counted from 1."""
        power = server_round + 1
        return float(
            self.learning_rate * (1 - self.beta_2**power) ** 0.5 / (1 - self.beta_1**power)
        )


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedAdam whose second moment moves by a bounded amount: v ← v - (1 - β₂) Δ² sign(v - Δ²); no bias correction.

    Attributes:
        learning_rate: η > 0.
        beta_1: β₁ in [0, 1).
        beta_2: β₂ in [0, 1).
        tau: τ > 0, the degree of adaptivity.

    Source:
        Reddi et al. 2021, Algorithm 2 (FedYogi). Equals Flower's `FedYogi`; like it, v starts at 0.
    """

    learning_rate: float = 0.01

    def _second_moment(self, past: np.ndarray, square: np.ndarray) -> np.ndarray:
        return past - (1 - self.beta_2) * square * np.sign(past - square)

    def _rate(self, server_round: int) -> float:
        return self.learning_rate


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "diloco": DiLoCo,
}


def _check_ranges(options: "FedAvgM | FedAdagrad | FedAdam") -> None:
    """Refuse options outside their ranges: decays in [0, 1), everything else positive."""
    for field in fields(options):
        value = getattr(options, field.name)
        decays = field.name in {"momentum", "beta_1", "beta_2"}
        good = 0 <= value < 1 if decays else 0 < value < float("inf")
        if not good:
            expected = "0 <= value < 1" if decays else "a finite number > 0"
            raise ConfigError(
                f"{type(options).__name__}: {field.name}: expected {expected}, got {value}"
            )


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)
