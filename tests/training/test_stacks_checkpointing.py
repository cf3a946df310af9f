"""Checkpoints change what is kept, and nothing that comes of it."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.optimizer import GrassSettings
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.training.full import train_full
from fedllm_flwr.training.full_job import FullJob, FullSettings
from fedllm_flwr.training.local import ClientJob, train
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import make_stack

MakeJob = Callable[..., ClientJob]
FIXED = (12, 250, 3, 77)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def both_ways(
    backbone: Backbone, jobs: list[ClientJob], **settings: Any
) -> list[tuple[np.ndarray, float]]:
    """Adapter and loss of each job, without checkpoints and with."""
    found = []
    for wanted in (False, True):
        local = LocalSettings(batch_size=2, local_steps=3, checkpointing=wanted, **settings)
        for result in train(backbone, jobs, local, fixed_ids=FIXED):
            assert result.error == ""
            found.append((result.adapter, result.loss))
    return found


def same(found: list[tuple[np.ndarray, float]]) -> bool:
    half = len(found) // 2
    pairs = zip(found[:half], found[half:], strict=True)
    return all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in pairs)


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_ends_with_the_same_bits(
    served: Backbone, make_job: MakeJob, spec: LoraSpec, clients: int, dropout: float
) -> None:
    own = replace(spec, dropout=dropout)
    found = both_ways(served, [make_job(c, own_spec=own) for c in range(clients)])
    assert same(found)
    assert not np.array_equal(found[0][0], make_job(0, own_spec=own).adapter)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_soft_prompts_end_with_the_same_bits(
    backbone: Backbone, make_prompt_job: MakeJob, placement: str
) -> None:
    assert same(both_ways(backbone, [make_prompt_job(c, placement=placement) for c in range(2)]))


def test_through_transformers_a_prompt_behind_a_text_forgoes_its_cache(
    backbone: Backbone, make_prompt_job: MakeJob
) -> None:
    slow = replace(backbone, kernels=replace(backbone.kernels, attention="sdpa"))
    plain, kept = both_ways(slow, [make_prompt_job(1)])
    assert kept[1] == pytest.approx(plain[1], rel=1e-5)
    np.testing.assert_allclose(kept[0], plain[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_pefts_prompts_end_with_the_same_bits(
    backbone: Backbone, make_job: MakeJob, kind: Any
) -> None:
    stack = make_stack(backbone, PeftPromptSpec(kind, 3), 1, "both")
    size = stack.read(0).size
    values = (0.1 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    job = replace(make_job(1), spec=PeftPromptSpec(kind, 3), adapter=values)
    assert same(both_ways(backbone, [job]))


def test_a_prefix_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="checkpointing: expected no prefix_tuning"):
        make_stack(backbone, PeftPromptSpec("prefix_tuning", 2), 1, "both", checkpointing=True)


@pytest.mark.parametrize("what", ["lora", "prompt", "grass"])
def test_the_peak_of_a_step_is_lower(
    served: Backbone, make_job: MakeJob, make_prompt_job: MakeJob, what: str
) -> None:
    lengths = {"num_rows": 16, "lengths": (60, 60)}
    job = make_prompt_job(1, **lengths) if what == "prompt" else make_job(1, **lengths)
    peaks = []
    for wanted in (False, True):
        local = LocalSettings(batch_size=16, local_steps=1, checkpointing=wanted)
        full = FullSettings(local=local, projection=GrassSettings(rank=4), checkpointing=wanted)
        with PeakMemory() as memory:
            if what == "grass":
                result = train_full(served, FullJob(1, job.rows, ("all-linear",), seed=1), full)
            else:
                [result] = train(served, [job], local, fixed_ids=FIXED)
        assert result.error == ""
        peaks.append(memory.peak)
    # of two blocks, one is held at a time
    assert peaks[1] < 0.8 * peaks[0]
