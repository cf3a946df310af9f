"""The adapters of several clients over one shared backbone, in one forward and backward pass.

The batch rows of the clients lie one after the other. The frozen layers see one large batch; only the thin
adapter products differ by client, and they are batched matrix products.

Axes: K clients in the batch, n rows of one client (its batch x tokens), r rank, i input features, o output features,
P size of a client's flat adapter.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.averaging import Adapter, LoraFactors
from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, Side
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.carried import delta_active
from fedllm_flwr.models.dropout import DropoutSeeds, SeededDropout
from fedllm_flwr.models.shapes import layer_shape

__all__ = ["CohortLora", "delta_active"]


class CohortLora:
    """Adapters of a cohort, as a context manager; inside it the backbone computes with them.

    ``leaves[c]`` is one flat float32 parameter of client c, holding the trained side in the order of
    ``layout``. After the backward pass of the sum of the clients' losses, its ``grad`` is that client's own
    gradient. A client whose adapter was not in the batch gets no gradient.

    Attributes:
        layout: Order of a leaf.
        leaves: Per client, its trained parameters.

    Args:
        backbone: The shared model; must be plain when the context is entered.
        spec: Settings of every client's adapter.
        num_clients: How many adapters are held, > 0.
        side: Which side is trained; the other one is loaded but gets no gradient.

    Raises:
        ConfigError: The rank is larger than a layer, or a target module names no linear layer.
    """

    def __init__(
        self, backbone: Backbone, spec: LoraSpec, num_clients: int, *, side: Side = "both"
    ) -> None:
        layers = backbone.target_layers(spec.target_modules)
        shapes = tuple(layer_shape(name, layer) for name, layer in layers.items())
        self.backbone = backbone
        self.spec = spec
        self.layout = AdapterLayout(shapes, spec.rank, side)
        self._whole = AdapterLayout(shapes, spec.rank)
        self._layouts = {True: self.layout}
        if side != "both":
            self._layouts[False] = AdapterLayout(shapes, spec.rank, "b" if side == "a" else "a")
        self._values = {
            trained: [self._blank(layout.size, trained) for _ in range(num_clients)]
            for trained, layout in self._layouts.items()
        }
        self.leaves: tuple[nn.Parameter, ...] = tuple(self._values[True])
        self._bound = tuple(range(num_clients))
        self._seeds = DropoutSeeds()
        self._layers = {
            name: _CohortLinear(layer, spec.scaling, SeededDropout(spec.dropout, name, self._seeds))
            for name, layer in layers.items()
        }
        self._context = ExitStack()

    def __enter__(self) -> "CohortLora":
        with ExitStack() as stack:
            stack.enter_context(self.backbone.swapped(self._layers))
            hook = self.backbone.model.base_model.register_forward_pre_hook(self._stack)
            stack.callback(hook.remove)
            self._context = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer in self._layers.values():
            layer.lora_a = layer.lora_b = None
        self._context.close()

    def load(self, client: int, adapter: Adapter) -> None:
        """Copy both factors of one client in place.

        Args:
            client: Index below num_clients.
            adapter: Factors of exactly the adapted layers.

        Raises:
            ShapeError: A layer is missing or too many, or a shape differs.
        """
        with torch.no_grad():
            for trained, layout in self._layouts.items():
                self._values[trained][client].copy_(torch.from_numpy(layout.pack(adapter)))

    def load_flat(self, client: int, flat: np.ndarray) -> None:
        """Copy both factors of one client in place.

        Args:
            client: Index below num_clients.
            flat: float32 array of both sides, in the order of a two-sided layout.

        Raises:
            ShapeError: The array has another size.
        """
        self.load(client, self._whole.unpack(flat, self.spec.scaling))

    def read(self, client: int) -> dict[str, LoraFactors]:
        """Float32 copies of both factors of one client."""
        frozen: dict[str, LoraFactors] | None = None
        sides = {
            trained: values[client].detach().to("cpu", copy=True).numpy()
            for trained, values in self._values.items()
        }
        if False in sides:
            blank = self._whole.unpack(np.zeros(self._whole.size, np.float32), self.spec.scaling)
            frozen = self._layouts[False].unpack(sides[False], self.spec.scaling, blank)
        return self.layout.unpack(sides[True], self.spec.scaling, frozen)

    def read_flat(self, client: int) -> np.ndarray:
        """One float32 copy of both factors of one client, in the order of a two-sided layout."""
        return self._whole.pack(self.read(client))

    def bind(self, indices: Sequence[int], *, dropout_seeds: Sequence[int] = ()) -> None:
        """Say which clients the following forward passes serve.

        Args:
            indices: Clients in the order of their batch rows; every client has the same number of rows.
            dropout_seeds: One seed per index, new for each forward pass in training with dropout. Without
                seeds dropout is off.

        Raises:
            ShapeError: No client is given, one is unknown or given twice, or seeds and indices differ in number.
        """
        known = range(len(self.leaves))
        if not indices or len(set(indices)) != len(indices) or not set(indices) <= set(known):
            raise ShapeError(
                f"cohort of {len(known)}: expected distinct client indices, got {list(indices)}"
            )
        if dropout_seeds and len(dropout_seeds) != len(indices):
            raise ShapeError(
                f"dropout: expected {len(indices)} seeds, one per client, got {len(dropout_seeds)}"
            )
        self._bound = tuple(indices)
        self._seeds.values = tuple(dropout_seeds)
        for layer in self._layers.values():
            layer.dropout.training = bool(dropout_seeds)

    def _blank(self, size: int, trained: bool) -> nn.Parameter:
        zeros = torch.zeros(size, dtype=torch.float32, device=self.backbone.device)
        return nn.Parameter(zeros, requires_grad=trained)

    def _stack(self, module: nn.Module, arguments: Any) -> None:
        """Before each pass, stack the bound clients' values and hand every layer its slices."""
        for trained, layout in self._layouts.items():
            stacked = torch.stack([self._values[trained][client] for client in self._bound])
            pieces = stacked.split(layout.sizes, dim=1)
            for (name, side, shape), piece in zip(layout.factors, pieces, strict=True):
                setattr(self._layers[name], f"lora_{side}", piece.view(-1, *shape))


class _CohortLinear(nn.Module):
    """A frozen linear layer plus one adapter product per client."""

    lora_a: Tensor | None  # [K, r, i]
    lora_b: Tensor | None  # [K, o, r]

    def __init__(self, base: nn.Module, scaling: float, dropout: SeededDropout) -> None:
        super().__init__()
        self.base_layer = base
        self.dropout = dropout
        self._scaling = scaling
        self.lora_a = self.lora_b = None

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.base_layer(features)
        if self.lora_a is None or self.lora_b is None:
            raise RuntimeError("cohort layers compute only through the decoder of their backbone")
        clients = len(self.lora_a)
        if len(features) % clients:
            raise ShapeError(f"cohort of {clients}: expected equal batch rows, got {len(features)}")
        # float32 like PEFT's own layers: the sum is rounded to the model's dtype once
        inputs = self.dropout(features.to(self.lora_a.dtype)).view(clients, -1, features.shape[-1])
        inner = torch.bmm(inputs, self.lora_a.transpose(1, 2)) * self._scaling
        update = torch.bmm(inner, self.lora_b.transpose(1, 2)).view(output.shape)
        return (output + update).to(output.dtype)
