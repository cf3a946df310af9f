"""Dropout whose mask belongs to a client, a step and a layer, not to a global generator.

With a global generator the mask of a client would depend on which other clients share its worker or its
batch. Here it is drawn from an address, so a client trains alike alone and in a cohort.

Axes: k clients, b rows of a client, t tokens, i features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm_flwr.seeding import torch_generator


@dataclass
class DropoutSeeds:
    """Seeds of the clients in the batch, in batch order; one object for all layers of an adapter."""

    values: tuple[int, ...] = ()


class SeededDropout(nn.Module):
    """Dropout with one seed per client, active in training mode.

    Args:
        probability: Of a feature to be zeroed, in [0, 1).
        layer: The layer's name, part of the address of its masks.
        seeds: Set by the owner before each forward pass.
    """

    def __init__(self, probability: float, layer: str, seeds: DropoutSeeds) -> None:
        super().__init__()
        self.probability = probability
        self._layer = layer
        self._seeds = seeds

    def forward(self, features: Tensor) -> Tensor:
        """Drop features [k * b, t, i].

        Raises:
            ValueError: No seeds were set.
        """
        if not self.training or self.probability == 0:
            return features
        if not self._seeds.values:
            raise ValueError(
                f"layer {self._layer}: dropout needs one seed per client before each forward pass"
            )
        rows = len(features) // len(self._seeds.values)
        masks = [
            self._mask(seed, (features.shape[1], rows, features.shape[2]))
            for seed in self._seeds.values
        ]
        mask = torch.cat(masks).to(features.device, features.dtype)
        return features * mask

    def _mask(self, seed: int, shape: tuple[int, int, int]) -> Tensor:
        """Mask [b, t, i]; drawn token by token, so that padding at the end changes no mask before it."""
        draws = torch.rand(shape, generator=torch_generator(seed, "dropout", self._layer))
        return (draws >= self.probability).transpose(0, 1) / (1 - self.probability)
