"""Every strategy that the configuration can name, and the undisturbed run of each."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

CASES: dict[str, tuple[str, ...]] = {
    "factor_mean": (),
    "stack": ("strategy=stack",),
    "residual": ("strategy=residual",),
    "svd": ("strategy=svd",),
    "b_only": ("method.sharing=b_only",),
    "alternating": ("method.sharing=alternating",),
    "fedavgm": ("strategy.server_optimizer=fedavgm",),
    "fedadam": ("strategy.server_optimizer=fedadam", "strategy.server_learning_rate=0.01"),
    "fedyogi": ("strategy.server_optimizer=fedyogi", "strategy.server_learning_rate=0.01"),
    "fedadagrad": ("strategy.server_optimizer=fedadagrad", "strategy.server_learning_rate=0.01"),
    "diloco": ("strategy.server_optimizer=diloco",),
}
"""Overrides of the ``micro`` run, by case."""

MIXED = ("method.client_ranks=[4,2,1,8]", "method.client_alphas=[8,4,16]", "method.use_rslora=true")
CASES |= {
    f"{name}_mixed": (*CASES[name], *MIXED)
    for name in ("factor_mean", "stack", "residual", "svd", "b_only", "alternating", "fedadam")
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, scope="session")


@pytest.fixture(scope="session")
def configured(micro: Callable[..., Any]) -> Callable[..., Any]:
    """The configuration of a case."""

    def compose(case: str, *overrides: str) -> Any:
        return micro(*CASES[case], *overrides)

    return compose


@pytest.fixture(scope="session")
def undisturbed(configured: Callable[..., Any], play: Callable[..., Any]) -> Callable[[str], Any]:
    """Three rounds of a case on two nodes, with nothing in the way."""
    return cache(lambda case: play(configured(case, "keep_checkpoints=9")))
