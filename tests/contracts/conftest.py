"""Every strategy that the configuration can name, and the undisturbed run of each."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

MIXED = ("method.client_ranks=[4,2,1,8]", "method.client_alphas=[8,4,16]", "method.use_rslora=true")
NOISE = (
    "privacy=central", "privacy.reproducible_noise=true", "privacy.cohort=fixed", "privacy.clip_norm=0.5",
    "privacy.noise_multiplier=0.1", "privacy.clip_quantile=0.5",
)  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {
    "factor_mean": (),
    "stack": ("strategy=stack",),
    "residual": ("strategy=residual",),
    "svd": ("strategy=svd",),
    "fedadam": ("strategy.server_optimizer=fedadam", "strategy.server_learning_rate=0.01"),
    "diloco": ("strategy.server_optimizer=diloco",),
    "factor_mean_mixed": MIXED,
    "stack_mixed": ("strategy=stack", *MIXED),
    "residual_mixed": ("strategy=residual", *MIXED),
    "svd_mixed": ("strategy=svd", *MIXED),
    "b_only_mixed": ("method.sharing=b_only", *MIXED),
    "alternating_mixed": ("method.sharing=alternating", *MIXED),
    "noised": ("method.sharing=b_only", "strategy.weighting=uniform", *NOISE),
    "prompt": ("method=fedprompt",),
    "prompt_personal": (
        "method=fedprompt", "method.personal_length=2", "method.local_training=alternating",
    ),
    "prompt_cluster": ("method=fedprompt", "method.cluster_length=2", "fairness=bounded_loss",
                       "strategy.server_optimizer=fedadam", "strategy.server_learning_rate=0.01"),
}  # fmt: skip
"""Overrides of the ``micro`` run, by case. Every rule, sharing and kind of server state; mixed ranks and alphas."""

FURTHER: dict[str, tuple[str, ...]] = {
    "b_only": ("method.sharing=b_only",),
    "alternating": ("method.sharing=alternating",),
    "prompt_before": ("method=fedprompt", "method.placement=before", "method.start=random"),
    "prompt_noised": ("method=fedprompt", "strategy.weighting=uniform", *NOISE),
    "prompt_q_ffl": ("method=fedprompt", "fairness=q_ffl"),
    "prompt_group_dro": ("method=fedprompt", "fairness=group_dro"),
    "prompt_own_starts": ("method=fedprompt", "method.common_start=false"),
    "lora_accuracy_gap": ("fairness=accuracy_gap", "fairness.groups=label"),
    "fedavgm": ("strategy.server_optimizer=fedavgm",),
    "fedyogi": ("strategy.server_optimizer=fedyogi", "strategy.server_learning_rate=0.01"),
    "fedadagrad": ("strategy.server_optimizer=fedadagrad", "strategy.server_learning_rate=0.01"),
}
"""Cases that differ from the others in little: they are resumed and summed, and spared the rest."""


SPLIT: dict[str, tuple[str, ...]] = {
    "split": ("method=fedresprompt",),
    "split_sync": ("method=fedresprompt", "method.mode=sync_sgd"),
    "split_label_private": ("method=fedresprompt", "method.mode=label_private"),
    "split_private": ("method=fedresprompt", "method.mode=private_controller"),
    "grass": ("method=fedgrass", "method.refresh_rounds=2"),
    "grass_local": (
        "method=fedgrass",
        "method.sharing=local",
        "method.rule=norm2_r",
        "method.refresh_steps=1",
    ),
}
"""Cases whose rounds have several exchanges: what holds of single messages is tested with their strategy."""

SPLIT_FURTHER: dict[str, tuple[str, ...]] = {
    "split_fedadam": ("method=fedresprompt", "strategy.server_optimizer=fedadam",
                      "strategy.server_learning_rate=0.01"),
    "split_texts": ("method=fedresprompt", "method.server_model=lm", "method.server_text=prompt_after"),
    "split_momentum": ("method=fedresprompt", "method.mode=sync_sgd", "optimizer=sgd",
                       "optimizer.momentum=0.9"),
    "grass_uniform": ("method=fedgrass", "method.rule=uniform_r", "optimizer=sgd"),
    "grass_galore": ("method=fedgrass", "method.trainer=galore"),
    "grass_dense": ("method=fedgrass", "method.trainer=dense", "method.rank=8"),
}  # fmt: skip
"""Of these, cases that differ from the others in little."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "loop_case" in metafunc.fixturenames:
        metafunc.parametrize("loop_case", [*CASES, *SPLIT], scope="session")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, scope="session")
    if "any_case" in metafunc.fixturenames:
        every = [*CASES, *FURTHER, *SPLIT, *SPLIT_FURTHER]
        metafunc.parametrize("any_case", every, scope="session")


@pytest.fixture(scope="session")
def configured(micro: Callable[..., Any]) -> Callable[..., Any]:
    """The configuration of a case."""

    def compose(case: str, *overrides: str) -> Any:
        return micro(*(CASES | FURTHER | SPLIT | SPLIT_FURTHER)[case], *overrides)

    return compose


@pytest.fixture(scope="session")
def undisturbed(configured: Callable[..., Any], play: Callable[..., Any]) -> Callable[[str], Any]:
    """Three rounds of a case on two nodes, with nothing in the way."""
    return cache(lambda case: play(configured(case, "keep_checkpoints=9")))
