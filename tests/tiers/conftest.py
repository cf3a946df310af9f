"""A small task and members of the tiny model; two runs as the command line leaves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.actions import run_experiment
from fedllm_flwr.averaging import LowRank
from fedllm_flwr.compose import compose_run
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.tasks.base import Task, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tiers import Computing, LocalMember, Tier

TINY = ModelRef("tiny")
COMPUTING = Computing(dtype="float32", device="cpu")
SMALL = ("experiment=smoke", "task.train_rows=24", "task.validation_rows=8", "task.test_rows=24", "partition=iid",
         "client.local_epochs=0", "client.local_steps=2", "optimizer.learning_rate=0.05", "num_rounds=1",
         "evaluate_every=1", "baselines=none")  # fmt: skip


@pytest.fixture(scope="session")
def task() -> Task:
    return load_task(TaskOptions(name="synthetic", validation_rows=8, test_rows=12), 0)


@pytest.fixture(scope="session")
def adapted() -> Callable[..., LocalMember]:
    """The tiny model under a random update, another one for each seed; seed 0 is the plain model."""

    def make(seed: int = 0, **options: Any) -> LocalMember:
        random = np.random.default_rng(seed)
        shapes = layer_shapes(TINY, ("q_proj", "v_proj"))
        delta = {
            shape.name: LowRank(
                random.normal(0, 1, (shape.out_features, 1)).astype(np.float32),
                random.normal(0, 1, (1, shape.in_features)).astype(np.float32),
            )
            for shape in shapes
        }
        return LocalMember(
            f"m{seed}",
            TINY,
            max_tokens=48,
            delta=delta if seed else None,
            computing=COMPUTING,
            **options,
        )

    return make


@pytest.fixture(scope="session")
def tier(adapted: Callable[..., LocalMember]) -> Callable[..., Tier]:
    """A tier of such members."""

    def make(name: str, *seeds: int, **options: Any) -> Tier:
        members = tuple(MemberConfig(model="tiny", name=f"m{seed}") for seed in seeds)
        config = TierConfig(name=name, members=members, **options)
        return Tier(config, tuple(adapted(seed) for seed in seeds))

    return make


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("tiers") / "lora")


@pytest.fixture(scope="session")
def prompt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ("method=fedprompt", "strategy=prompt_mean", "method.length=3", "task.template=read")
    return finished(tmp_path_factory.mktemp("tiers") / "prompt", *more)


def finished(folder: Path, *more: str) -> Path:
    overrides = [*SMALL, *more]
    run_experiment(compose_run(overrides).config, overrides, str(folder))
    return folder
