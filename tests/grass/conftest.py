"""Micro-batches of a linear layer, and torch's own optimizers on its dense gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm_flwr.grass.base import BaseRule, MatrixOptimizer

Pair = tuple[Tensor, Tensor]
Step = list[Pair]


class Shapes(TorchDispatchMode):
    """Shapes of all new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func._schema.is_mutable:
            self.seen.add(tuple(found.shape))
        return found


@pytest.fixture
def shapes() -> type[Shapes]:
    """A context that notes the shapes of all tensors that are made in it."""
    return Shapes


@pytest.fixture(scope="session")
def make_steps() -> Callable[..., list[Step]]:
    """Steps of micro-batches (slope [5, 6], inputs [5, 9])."""

    def make(
        count: int, micro_batches: int = 1, dtype: torch.dtype = torch.float64, positions: int = 5
    ) -> list[Step]:
        generator = torch.Generator().manual_seed(7)

        def draw(width: int) -> Tensor:
            return torch.randn(positions, width, generator=generator, dtype=dtype)

        return [[(draw(6), draw(9)) for _ in range(micro_batches)] for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def start() -> Tensor:
    """A weight [6, 9]."""
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def play() -> Callable[[MatrixOptimizer, Sequence[Step]], None]:
    """Run steps."""

    def run(matrix: MatrixOptimizer, steps: Sequence[Step]) -> None:
        for step in steps:
            for slope, inputs in step:
                matrix.add(slope, inputs)
            matrix.step()

    return run


@pytest.fixture(scope="session")
def reference(start: Tensor) -> Callable[[BaseRule, Sequence[Step]], Tensor]:
    """What torch's own optimizer makes of the start weight and the dense gradients."""

    def train(rule: BaseRule, steps: Sequence[Step]) -> Tensor:
        weight = torch.nn.Parameter(start.clone())
        rate, decay = rule.learning_rate, rule.weight_decay
        optimizer = (
            torch.optim.SGD([weight], rate, momentum=rule.momentum, weight_decay=decay)
            if rule.name == "sgd"
            else torch.optim.AdamW(
                [weight], rate, (rule.beta1, rule.beta2), rule.epsilon, weight_decay=decay
            )
        )
        for step in steps:
            weight.grad = sum(slope.t() @ inputs for slope, inputs in step)
            optimizer.step()
        return weight.detach()

    return train


@pytest.fixture(
    params=[
        BaseRule(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.3),
        BaseRule(name="adamw", learning_rate=0.1, weight_decay=0.3),
    ],
    ids=["sgd", "adamw"],
)
def rule(request: pytest.FixtureRequest) -> BaseRule:
    """A base optimizer with everything on."""
    return request.param
