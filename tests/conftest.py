"""Fixtures that several packages' tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: the same bits as in a worker, and no contention between test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[..., RunConfig]:
    """The smoke experiment with overrides, into the test's own folder."""

    def composed(*overrides: str) -> RunConfig:
        return compose_run(["experiment=smoke", f"out_dir={tmp_path / 'run'}", *overrides]).config

    return composed
