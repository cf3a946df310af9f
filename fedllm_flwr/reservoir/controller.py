"""The trained part of a client: from a reservoir's state to a soft prompt, with gradients by hand.

    b = W_out z,   p = reshape(P b)
    dL/dP = g bᵀ,  dL/dW_out = (Pᵀ g) zᵀ     with g = dL/dp and P as it was in the forward pass

Axes: B examples, R values of z, k bottleneck, m prompt tokens, d width of the model's input embeddings.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.seeding import numpy_generator

START_SCALE = 0.1
"""Standard deviation of all start values."""

OptimizerName = Literal["sgd", "adam"]


@dataclass(frozen=True)
class ControllerSpec:
    """Sizes of a controller, and the order of its values in one flat array: W_out by rows, then P by rows.

    Attributes:
        readout_size: R.
        bottleneck: k.
        prompt_length: m.
        width: d.

    Raises:
        ConfigError: A size is below 1.
    """

    readout_size: int
    bottleneck: int
    prompt_length: int
    width: int

    def __post_init__(self) -> None:
        sizes = (self.readout_size, self.bottleneck, self.prompt_length, self.width)
        if min(sizes) < 1:
            raise ConfigError(f"controller: expected sizes >= 1, got {sizes}")

    @property
    def readout_values(self) -> int:
        """Values of W_out: the first ones of the flat array, and all of it that leaves a client whose P is private."""
        return self.bottleneck * self.readout_size

    @property
    def size(self) -> int:
        """Values of W_out and P: k R + m d k."""
        return self.readout_values + self.prompt_length * self.width * self.bottleneck

    def start(self, seed: int) -> Tensor:
        """Start values 0.1 N(0, 1), the same for every holder of the seed; float32 [size]."""
        drawn = numpy_generator(seed, "controller").standard_normal(self.size)
        return torch.from_numpy(START_SCALE * drawn).float()

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a flat array.

        Args:
            flat: [size]

        Returns:
            W_out [k, R] and P [m d, k].

        Raises:
            ShapeError: The array has another size.
        """
        if tuple(flat.shape) != (self.size,):
            raise ShapeError(f"controller: expected {self.size} values, got {list(flat.shape)}")
        readout, lift = flat.split([self.readout_values, self.size - self.readout_values])
        return readout.view(self.bottleneck, -1), lift.view(-1, self.bottleneck)


class Controller:
    """A controller's values and its two passes.

    Attributes:
        spec: Its sizes.
        flat: The values, in the dtype that they came in; a leaf that a torch optimizer can step. [size]

    Args:
        spec: Its sizes.
        values: Copied. [size]

    Raises:
        ShapeError: The values have another size.
    """

    def __init__(self, spec: ControllerSpec, values: Tensor) -> None:
        self.spec = spec
        self.flat = nn.Parameter(values.detach().clone(), requires_grad=False)
        self.readout, self.lift = spec.split(self.flat.data)

    def load(self, values: Tensor) -> None:
        """Overwrite the values in place.

        Raises:
            ShapeError: The values have another size.
        """
        self.spec.split(values)
        self.flat.data.copy_(values)

    def prompts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass.

        Args:
            z: Reservoir states. [B, R]

        Returns:
            b [B, k], which the gradient asks for, and the prompts p [B, m, d].

        Raises:
            ShapeError: The states have another width.
        """
        if z.ndim != 2 or z.shape[1] != self.spec.readout_size:
            raise ShapeError(
                f"reservoir states: expected shape [examples, {self.spec.readout_size}], "
                f"got {list(z.shape)}"
            )
        b = z @ self.readout.T
        return b, (b @ self.lift.T).view(len(z), self.spec.prompt_length, self.spec.width)

    def gradient(self, z: Tensor, b: Tensor, prompt_gradient: Tensor) -> Tensor:
        """The mean over examples of the gradient at the present values.

        Args:
            z: What :meth:`prompts` was given, B >= 1. [B, R]
            b: What it gave. [B, k]
            prompt_gradient: g, of each example's own loss. [B, m, d]

        Returns:
            A new flat array in the layout of the values. [size]

        Raises:
            ShapeError: The gradient is not of these prompts' shape, or there is no example.
        """
        wanted = (len(z), self.spec.prompt_length, self.spec.width)
        if tuple(prompt_gradient.shape) != wanted or not len(z):
            raise ShapeError(
                f"prompt gradient: expected shape {list(wanted)} with at least one example, "
                f"got {list(prompt_gradient.shape)}"
            )
        g = prompt_gradient.reshape(len(z), -1)
        result = torch.empty_like(self.flat.data)
        readout, lift = self.spec.split(result)
        # The mean's divisor goes on the small factors.
        torch.mm(self.lift.T @ g.T, z / len(z), out=readout)
        torch.mm(g.T, b / len(z), out=lift)
        return result

    def step(self, optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
        """One step of an optimizer of :meth:`optimizer`, W_out and P together.

        Args:
            optimizer: Holds the moments.
            gradient: [size]
        """
        self.flat.grad = gradient
        optimizer.step()
        self.flat.grad = None

    def optimizer(self, name: OptimizerName, learning_rate: float) -> torch.optim.Optimizer:
        """A fresh optimizer of the values: plain SGD, or Adam with torch's defaults.

        Args:
            name: ``sgd`` or ``adam``.
            learning_rate: > 0.

        Raises:
            ConfigError: The name is unknown or the rate is not positive.
        """
        if name not in get_args(OptimizerName):
            raise ConfigError(f"controller optimizer: expected sgd or adam, got {name!r}")
        if not 0 < learning_rate < float("inf"):
            raise ConfigError(f"controller learning rate: expected > 0, got {learning_rate}")
        if name == "sgd":
            return torch.optim.SGD([self.flat], lr=learning_rate, foreach=False)
        return torch.optim.Adam([self.flat], lr=learning_rate, foreach=False)
