import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fedllm_flwr
from fedllm_flwr.averaging import LoraFactors, LowRank
from fedllm_flwr.models import backbone as backbone_module
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.layout import LoraSpec, initial_factors
from fedllm_flwr.models.shapes import LayerShape
from fedllm_flwr.models.tiny import tiny_model, tiny_tokenizer

ROOT = Path(fedllm_flwr.__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Iterator[Backbone]:
    yield backbone_module.load(ModelRef("tiny"), dtype="float32")
    backbone_module.reset()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The tiny model as a float32 checkpoint folder, as a user would have one."""
    folder = tmp_path / "checkpoint"
    tiny_model(seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_adapter() -> Callable[..., dict[str, LoraFactors]]:
    """Adapters with both factors non-zero."""

    def make(shapes: tuple[LayerShape, ...], spec: LoraSpec, seed: int) -> dict[str, LoraFactors]:
        rng = np.random.default_rng(seed)
        start = initial_factors(shapes, spec, seed)
        return {
            name: LoraFactors(
                factors.lora_a,
                rng.normal(0, 0.1, factors.lora_b.shape).astype(np.float32),
                factors.scaling,
            )
            for name, factors in start.items()
        }

    return make


@pytest.fixture
def make_delta() -> Callable[..., dict[str, LowRank]]:
    def make(shapes: tuple[LayerShape, ...], rank: int, seed: int) -> dict[str, LowRank]:
        rng = np.random.default_rng(seed)
        return {
            shape.name: LowRank(
                rng.normal(0, 0.05, (shape.out_features, rank)).astype(np.float32),
                rng.normal(0, 1, (rank, shape.in_features)).astype(np.float32),
            )
            for shape in shapes
        }

    return make


@pytest.fixture
def start_python() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a real second Python process; what is still running at the end of the test is ended."""
    running: list[subprocess.Popen[str]] = []

    def start(script: str, **environment: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()
