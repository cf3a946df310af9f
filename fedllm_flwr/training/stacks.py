"""The adapters that one cohort trains: PEFT's layers for a single client, stacked factors for several.

Both offer the same few operations, so that there is one training loop.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from torch import nn

from fedllm_flwr.models.adapters import AttachedLora, LoraSpec, attach
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.cohort import CohortLora
from fedllm_flwr.training.settings import Side


class AdapterStack(Protocol):
    """The adapters of the clients 0 to K - 1 of a cohort."""

    def active(self) -> AbstractContextManager[object]:
        """Inside, the backbone computes with the bound adapters and they get gradients."""

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy a client's flat adapter in place; raises ShapeError if its size is wrong."""

    def read(self, client: int) -> np.ndarray:
        """A copy of a client's flat adapter."""

    def parameters(self, client: int) -> list[nn.Parameter]:
        """What is trained of a client."""

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """Say which clients the next pass serves, and the seeds of their dropout masks."""


def make_stack(backbone: Backbone, spec: LoraSpec, num_clients: int, side: Side) -> AdapterStack:
    """Stacked factors; or PEFT's layers where there is one client, and so nothing to stack."""
    if num_clients == 1:
        return _Single(attach(backbone, spec), side)
    return _Stacked(CohortLora(backbone, spec, num_clients, side=side))


class _Single:
    def __init__(self, attached: AttachedLora, side: Side) -> None:
        self._attached = attached
        self._side = side

    def active(self) -> AbstractContextManager[object]:
        return self._attached.active(train=True, side=self._side)

    def load(self, client: int, flat: np.ndarray) -> None:
        self._attached.load_flat(flat)

    def read(self, client: int) -> np.ndarray:
        return self._attached.read_flat()

    def parameters(self, client: int) -> list[nn.Parameter]:
        return self._attached.parameters(self._side)

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        self._attached.seed_dropout(dropout_seeds[0])


class _Stacked:
    def __init__(self, cohort: CohortLora) -> None:
        self._cohort = cohort

    def active(self) -> AbstractContextManager[object]:
        return self._cohort

    def load(self, client: int, flat: np.ndarray) -> None:
        self._cohort.load_flat(client, flat)

    def read(self, client: int) -> np.ndarray:
        return self._cohort.read_flat(client)

    def parameters(self, client: int) -> list[nn.Parameter]:
        return [self._cohort.leaves[client]]

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        self._cohort.bind(clients)
