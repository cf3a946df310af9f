"""Every strategy that the configuration can name, and the undisturbed run of each."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
from flwr.app import Context, Message

from fedllm_flwr import records
from fedllm_flwr.client_app import app

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


FROM_THE_START = ("factor_mean", "prompt_personal", "split_private", "grass")
"""Cases that are also resumed from the checkpoint before their first round: one of each method."""

UNDER_FLOWER = ("factor_mean", "stack_mixed", "alternating_mixed", "noised", "prompt_personal", "prompt_cluster",
                "split", "split_label_private", "grass_local")  # fmt: skip
"""Cases that run under Flower's loop: each kind of message and state; rules alone differ in nothing that it sees."""


def resumes() -> list[tuple[str, int]]:
    """Cases and the rounds that they are resumed after; those that differ in little once, with two rounds to go."""
    once = [(case, 1) for case in (*FURTHER, *SPLIT_FURTHER)]
    return (
        [(case, r) for case in (*CASES, *SPLIT) for r in (1, 2)]
        + once
        + [(c, 0) for c in FROM_THE_START]
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "loop_case" in metafunc.fixturenames:
        metafunc.parametrize("loop_case", [*CASES, *SPLIT], scope="session")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, scope="session")
    if "resumed_case" in metafunc.fixturenames:
        metafunc.parametrize(("resumed_case", "last"), resumes(), scope="session")
    if "flower_case" in metafunc.fixturenames:
        metafunc.parametrize("flower_case", UNDER_FLOWER, scope="session")


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


class Remembering:
    """The project's ClientApp, which computes an answer once and gives it again to an equal message.

    A first round's training depends on its message alone, so most of these tests would train the same again.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[Any, ...], Any] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        body = records.read_body(message)
        body.pop("run", None)
        arrays = message.content.get("arrays")
        sent = arrays["flat"].numpy().tobytes() if arrays is not None else b""
        node = tuple(context.node_config.values())
        key = (message.metadata.message_type, json.dumps(body, sort_keys=True), sent, node)
        if key not in self._answers:
            self._answers[key] = deepcopy(app(message, context).content)
        return Message(deepcopy(self._answers[key]), reply_to=message)


@pytest.fixture(scope="module")
def remembering() -> Remembering:
    """For tests that spoil what comes back, and not how it was made."""
    return Remembering()
