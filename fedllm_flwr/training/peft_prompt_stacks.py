"""PEFT's prompt methods in the training loop, one client at a time."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor, nn

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, attach_prompt
from fedllm_flwr.training.full_layers import kept_inputs


class PeftPromptStack:
    """The module of client 0, the only one; an :class:`fedllm_flwr.training.stacks.AdapterStack`.

    Args:
        backbone: The shared model.
        spec: Settings of the module.
        checkpointing: As in :func:`fedllm_flwr.training.stacks.make_stack`.

    Raises:
        ConfigError: Checkpoints are asked for with a prefix: a block that is computed again would read a cache that it
            has written already.
    """

    def __init__(
        self, backbone: Backbone, spec: PeftPromptSpec, *, checkpointing: bool = False
    ) -> None:
        if checkpointing and spec.kind == "prefix_tuning":
            raise ConfigError("checkpointing: expected no prefix_tuning, whose keys are in a cache")
        self._attached = attach_prompt(backbone, spec)
        self._checkpointing = checkpointing

    def active(self) -> AbstractContextManager[object]:
        """Nothing but how the model keeps its activations is changed."""
        return kept_inputs(self._attached.backbone, self._checkpointing)

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
