"""What a LoRA adapter is: its settings, its place in one flat array, and the values it starts from.

Axes: r rank, i input features, o output features, P size of a flat adapter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm_flwr.averaging import Adapter, LoraFactors
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.shapes import LayerShape, check_rank
from fedllm_flwr.seeding import numpy_generator

Side = Literal["both", "a", "b"]


@dataclass(frozen=True)
class LoraSpec:
    """Settings of an adapter.

    Attributes:
        rank: r, at least 1.
        alpha: Numerator of the scaling, > 0.
        dropout: Probability of dropping an input feature of the adapter in training, in [0, 1).
        target_modules: As in :meth:`fedllm_flwr.models.backbone.Backbone.target_layers`.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Hu et al. 2021, section 4.1; Kalajdzievski 2023 for the square root.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA rank: expected at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"LoRA alpha: expected a finite number > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA dropout: expected a probability in [0, 1), got {self.dropout}")
        if not self.target_modules or isinstance(self.target_modules, str):
            raise ConfigError(
                f"LoRA target_modules: expected a list of layer names, got {self.target_modules!r}"
            )

    @property
    def scaling(self) -> float:
        """Factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class AdapterLayout:
    """Where each factor lies in one flat array.

    Layers come in sorted order, and per layer A [r, i] before B [o, r], row by row.

    Attributes:
        layers: The adapted layers, sorted by name.
        rank: r of every layer.
        side: ``both``, or the only factor that the array holds: ``a`` or ``b``.

    Raises:
        ConfigError: The rank is larger than a layer.
        ShapeError: The layers are not sorted.
    """

    layers: tuple[LayerShape, ...]
    rank: int
    side: Side = "both"

    def __post_init__(self) -> None:
        check_rank(self.layers, self.rank)
        names = [layer.name for layer in self.layers]
        if names != sorted(set(names)):
            raise ShapeError(
                f"adapter layout: expected layers sorted by name without repetition, got {names}"
            )

    @property
    def factors(self) -> tuple[tuple[str, str, tuple[int, int]], ...]:
        """Per factor held: its layer, its side (``a`` or ``b``), its shape; in the order of the array."""
        return tuple(
            (
                layer.name,
                side,
                (self.rank, layer.in_features) if side == "a" else (layer.out_features, self.rank),
            )
            for layer in self.layers
            for side in ("a", "b")
            if self.side in ("both", side)
        )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each factor held."""
        return tuple(shape for _, _, shape in self.factors)

    @property
    def sizes(self) -> list[int]:
        """Elements of each factor held."""
        return [rows * columns for _, _, (rows, columns) in self.factors]

    @property
    def size(self) -> int:
        """Elements P of the flat array."""
        return sum(self.sizes)

    def pack(self, adapter: Adapter) -> np.ndarray:
        """Copy an adapter into one new array.

        Args:
            adapter: Factors of exactly these layers and this rank. Scalings are not stored.

        Returns:
            float32 array [P].

        Raises:
            ShapeError: Layers or shapes differ.
        """
        names = {layer.name for layer in self.layers}
        if set(adapter) != names:
            odd = sorted(set(adapter) ^ names)
            raise ShapeError(
                f"adapter: expected {len(names)} layers of the layout, these differ: {', '.join(odd[:3])}"
            )
        flat = np.empty(self.size, dtype=np.float32)
        for name, side, view in self._views(flat):
            value = adapter[name].lora_a if side == "a" else adapter[name].lora_b
            if value.shape != view.shape:
                raise ShapeError(
                    f"layer {name}, lora_{side}: expected {view.shape}, got {value.shape}"
                )
            view[...] = value
        return flat

    def unpack(
        self, flat: np.ndarray, scaling: float, frozen: Adapter | None = None
    ) -> dict[str, LoraFactors]:
        """The factors as views into a flat array; nothing is copied.

        Args:
            flat: Array [P].
            scaling: Scaling of every layer.
            frozen: Source of the factor that a one-sided layout does not hold.

        Returns:
            Factors by layer.

        Raises:
            ShapeError: The array has another size, or a one-sided layout gets nothing for the other side.
        """
        if flat.shape != (self.size,):
            raise ShapeError(f"flat adapter: expected ({self.size},), got {flat.shape}")
        if self.side != "both" and frozen is None:
            raise ShapeError(
                f"flat adapter of side {self.side}: expected the frozen other side, got none"
            )
        found: dict[str, dict[str, np.ndarray]] = {layer.name: {} for layer in self.layers}
        for name, side, view in self._views(flat):
            found[name][side] = view
        if frozen is not None:
            for name, sides in found.items():
                sides.setdefault("a", frozen[name].lora_a)
                sides.setdefault("b", frozen[name].lora_b)
        return {name: LoraFactors(sides["a"], sides["b"], scaling) for name, sides in found.items()}

    def _views(self, flat: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
        start = 0
        for name, side, shape in self.factors:
            stop = start + shape[0] * shape[1]
            yield name, side, flat[start:stop].reshape(shape)
            start = stop


def initial_factors(
    shapes: tuple[LayerShape, ...], spec: LoraSpec, seed: int
) -> dict[str, LoraFactors]:
    """The adapter that training starts from: A random, B zero, so that the model is unchanged.

    Args:
        shapes: The adapted layers.
        spec: Settings.
        seed: Root seed; each layer draws at its own address, so the values do not depend on the process or
            on other layers.

    Returns:
        Factors by layer; A is uniform in ±1/sqrt(i), the bound of PEFT's Kaiming-uniform start.

    Raises:
        ConfigError: The rank is larger than a layer.

    Source:
        PEFT's ``reset_lora_parameters`` (Kaiming-uniform with a = sqrt(5)); Hu et al. 2021 drew A from a Gaussian.
    """
    check_rank(shapes, spec.rank)
    factors = {}
    for shape in shapes:
        bound = 1 / math.sqrt(shape.in_features)
        draws = numpy_generator(seed, "lora_a", shape.name).uniform(
            -bound, bound, (spec.rank, shape.in_features)
        )
        lora_b = np.zeros((shape.out_features, spec.rank), dtype=np.float32)
        factors[shape.name] = LoraFactors(draws.astype(np.float32), lora_b, spec.scaling)
    return factors
