"""PEFT's prompt methods in the training loop, one client at a time."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from torch import Tensor, nn

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, attach_prompt


class PeftPromptStack:
    """The module of client 0, the only one; an :class:`fedllm_flwr.training.stacks.AdapterStack`.

    Args:
        backbone: The shared model.
        spec: Settings of the module.
    """

    def __init__(self, backbone: Backbone, spec: PeftPromptSpec) -> None:
        self._attached = attach_prompt(backbone, spec)

    def active(self) -> AbstractContextManager[object]:
        """Nothing is changed in the model."""
        return nullcontext()

    def load(self, client: int, flat: np.ndarray) -> None:
        """Copy in."""
        self._attached.values.load(flat)

    def read(self, client: int) -> np.ndarray:
        """Copy out."""
        return self._attached.values.read()

    def parameters(self, client: int) -> list[nn.Parameter]:
        """Those of PEFT's module."""
        return self._attached.values.parameters()

    def bind(self, clients: Sequence[int], dropout_seeds: Sequence[int]) -> None:
        """There is one client and no dropout."""

    def hidden(self, input_ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Through transformers; the states of virtual tokens are left out."""
        return self._attached.hidden(input_ids)

    def backward(self, hidden: Tensor, slope: Tensor) -> None:
        """By automatic differentiation."""
        hidden.backward(slope)
