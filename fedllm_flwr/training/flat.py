"""The trained and the frozen half of flat adapters, and their factors as views.

Axes: K clients, P trained and Q frozen values of one client, r rank, i inputs, o outputs.
"""

import numpy as np
from torch import Tensor

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.shapes import layer_shape
from fedllm_flwr.training.settings import Side


class FlatFactors:
    """How the adapters of one specification lie in flat arrays when one side of them is trained.

    Attributes:
        scaling: Of every adapter.
        trained_size: P.
        frozen_size: Q; 0 if both sides are trained.

    Args:
        backbone: Where the layers are.
        spec: Settings of the adapters.
        side: What is trained.

    Raises:
        ConfigError: The rank is larger than a layer, or a target module names no linear layer.
    """

    def __init__(self, backbone: Backbone, spec: LoraSpec, side: Side) -> None:
        layers = backbone.target_layers(spec.target_modules)
        shapes = tuple(layer_shape(name, layer) for name, layer in layers.items())
        self._factors = AdapterLayout(shapes, spec.rank).factors
        self._side = side
        held = [np.full(np.prod(shape), self._trains(own)) for _, own, shape in self._factors]
        self._mask = np.concatenate(held)
        self.scaling = spec.scaling
        self.trained_size = int(self._mask.sum())
        self.frozen_size = len(self._mask) - self.trained_size

    def split(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The trained [P] and the frozen values [Q]; not copied if all are trained.

        Raises:
            ShapeError: The array has another size.
        """
        if flat.shape != self._mask.shape:
            raise ShapeError(f"flat adapter: expected {self._mask.shape}, got {flat.shape}")
        if not self.frozen_size:
            return flat, flat[:0]
        return flat[self._mask], flat[~self._mask]

    def join(self, trained: np.ndarray, frozen: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`split`, as a copy."""
        if not self.frozen_size:
            return trained.astype(np.float32)
        flat = np.empty(self._mask.shape, dtype=np.float32)
        flat[self._mask], flat[~self._mask] = trained, frozen
        return flat

    def factors(self, trained: Tensor, frozen: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views A [K, r, i] and B [K, o, r] by layer into [K, P] and [K, Q]."""
        own, other = self._views(trained, True), self._views(frozen, False)
        found = {**own, **other}
        return {name: (found[name, "a"], found[name, "b"]) for name, _ in found}

    def slopes(self, trained: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Views by layer into a gradient [K, P]; None for the side that is not trained."""
        own = self._views(trained, True)
        return {name: (own.get((name, "a")), own.get((name, "b"))) for name, _ in own}

    def _trains(self, own_side: str) -> bool:
        return self._side in ("both", own_side)

    def _views(self, flat: Tensor, trained: bool) -> dict[tuple[str, str], Tensor]:
        chosen = [factor for factor in self._factors if self._trains(factor[1]) is trained]
        pieces = flat.split([shape[0] * shape[1] for _, _, shape in chosen], dim=1)
        return {
            (name, own): piece.view(-1, *shape)
            for (name, own, shape), piece in zip(chosen, pieces, strict=True)
        }
