"""CPU cost and memory of a client message: this project against a client written the usual way.

    python benchmarks/round.py [--quick]

The usual client (`usual_client.py`) rebuilds model, PEFT wrap and Trainer for each message; ours calls
`fedllm_flwr.training.local.train` on a loaded backbone, adapter in and adapter out. Both train the same
rows of SmolLM2-135M with the same LoRA (r 8 on q_proj and v_proj), AdamW, clipping and dtype, on one
thread, and their first losses are compared. Costs are CPU seconds of the process, never wall time; the
sides are measured in turns, so that all meet the same load, and a ratio is that of the medians.

The last line is one JSON object:

- ``ratio_4x4x64``: usual / ours, 4 steps of 4 rows x 64 tokens;
- ``ratio_1x1x32``: usual / ours, 1 step of 1 row x 32 tokens;
- ``ratio_cohort8_1x32``: eight such messages / one call that trains eight clients together;
- ``overhead_4x4x64``: our message / its bare forward passes, backward passes and optimizer steps;
- ``second_worker_memory_ratio``: memory (PSS) that a second worker adds, ours / usual;
- ``second_worker_backbone_private_bytes``: of its mapped weights, bytes that it does not share.

These hold with a loss on every token. The first four come again with the suffix ``_answer``, for rows of
which only the last ``ANSWER_TOKENS`` tokens are targets, as in instruction tuning.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from torch import nn
from usual_client import TensorRow, UsualClient, lora_config, silence

from fedllm_flwr.models.adapters import (
    AdapterLayout,
    LoraSpec,
    attach,
    initial_factors,
    layer_shapes,
)
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, collate
from fedllm_flwr.training.local import ClientJob, LocalResult, train
from fedllm_flwr.training.loop import batch_losses, make_optimizer
from fedllm_flwr.training.settings import LocalSettings

MODEL = ModelRef(name="smollm2_135m")
SPEC = LoraSpec(rank=8, alpha=16.0)
SETTINGS = LocalSettings(learning_rate=1e-3, clip_norm=1.0)
ANSWER_TOKENS = 8
LOSS_TOLERANCE = 5e-3
"""Relative. bfloat16 keeps 8 bits of every logit; attention and loss are summed in another order."""
REPEATS, QUICK_REPEATS = 7, 3
GATES: dict[str, tuple[str, float]] = {
    "ratio_4x4x64": (">=", 2.0),
    "ratio_1x1x32": (">=", 5.0),
    "ratio_cohort8_1x32": (">=", 8.0),
    "overhead_4x4x64": ("<=", 1.15),
    "second_worker_memory_ratio": ("<=", 0.5),
    "second_worker_backbone_private_bytes": ("<=", 0.0),
}


ALL_LABELS = -1


@dataclass(frozen=True)
class Shape:
    """Work of one message.

    Attributes:
        rows: Rows in total.
        batch: Rows of a step.
        length: Input tokens of a row.
        answer: Tokens at the end of a row that are targets, or ``ALL_LABELS``: all but the first.
    """

    rows: int
    batch: int
    length: int
    answer: int = ALL_LABELS

    @property
    def targets(self) -> int:
        """Targets of a row."""
        return self.length - 1 if self.answer == ALL_LABELS else self.answer


class Bench:
    """Both clients with the same rows and start values."""

    def __init__(self) -> None:
        self.backbone: Backbone = load(MODEL, threads=1)
        shapes = layer_shapes(MODEL, SPEC.target_modules)
        self.layout = AdapterLayout(shapes, SPEC.rank)
        self.factors = initial_factors(shapes, SPEC, seed=0)
        self.usual = UsualClient(
            folder=converted(MODEL, self.backbone.kernels.dtype),
            dtype=self.backbone.dtype,
            lora=lora_config(SPEC.rank, SPEC.alpha, SPEC.target_modules),
            learning_rate=SETTINGS.learning_rate,
            clip_norm=SETTINGS.clip_norm,
        )
        self._state = {
            f"base_model.model.{name}.lora_{side}.weight": torch.from_numpy(value)
            for name, factors in self.factors.items()
            for side, value in (("A", factors.lora_a), ("B", factors.lora_b))
        }

    def ours(self, shape: Shape, clients: int = 1) -> Callable[[], list[LocalResult]]:
        """A call that trains clients; a row has exactly the usual client's tokens and targets."""
        adapter = self.layout.pack(self.factors)
        jobs = [
            ClientJob(
                client,
                [_encoded(ids, shape) for ids in self._tokens(shape, client)],
                adapter,
                SPEC,
                client,
            )
            for client in range(clients)
        ]
        settings = replace(SETTINGS, batch_size=shape.batch)
        return lambda: train(self.backbone, jobs, settings)

    def usual_message(self, shape: Shape) -> Callable[[], float]:
        """The usual client's message on the same rows; gives its mean loss."""
        rows = [_labelled(ids, shape) for ids in self._tokens(shape, 0)]
        return lambda: self.usual.message(self._state, rows, shape.batch)[1]

    def bare_steps(self, shape: Shape) -> Callable[[], None]:
        """Only the passes and updates of our message, with everything else done beforehand."""
        rows = [_encoded(ids, shape) for ids in self._tokens(shape, 0)]
        attached = attach(self.backbone, SPEC)
        attached.load(self.factors)
        optimizer = make_optimizer(attached.parameters(), SETTINGS)
        shares = [
            Share(rows[start : start + shape.batch], 1 / (shape.batch * shape.targets))
            for start in range(0, shape.rows, shape.batch)
        ]
        batches = [collate([share], self.backbone.device) for share in shares]

        def steps() -> None:
            with attached.active(train=True):
                for batch in batches:
                    (batch_losses(self.backbone, batch, None) * batch.weights).sum().backward()
                    nn.utils.clip_grad_norm_(attached.parameters(), SETTINGS.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()

        return steps

    def _tokens(self, shape: Shape, client: int) -> np.ndarray:
        """Random token ids [rows, length]."""
        draws = numpy_generator(0, "benchmark", client)
        vocabulary = len(self.backbone.head_weight())
        return draws.integers(0, vocabulary, (shape.rows, shape.length))


def _encoded(ids: np.ndarray, shape: Shape) -> Encoded:
    positions = np.arange(shape.length - 1 - shape.targets, shape.length - 1)
    return Encoded(
        row_id="",
        input_ids=ids.astype(np.int32),
        predict_from=positions.astype(np.int32),
        targets=ids[positions + 1].astype(np.int32),
        label=-1,
        characters=1,
    )


def _labelled(ids: np.ndarray, shape: Shape) -> TensorRow:
    labels = np.where(np.arange(shape.length) < shape.length - shape.targets, -100, ids)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call, taken in turns after one call of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            gc.collect()
            began = time.process_time()
            call()
            if repeat:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def first_losses(bench: Bench, answer: int) -> tuple[float, float]:
    """Loss of the first step on the same rows: ours and the usual client's."""
    shape = Shape(rows=4, batch=4, length=64, answer=answer)
    [result] = bench.ours(shape)()
    return result.first_loss, bench.usual_message(shape)()


def time_ratios(bench: Bench, answer: int, repeats: int) -> dict[str, float]:
    """The four ratios of CPU time for one kind of labels; prints the table of seconds."""
    large = Shape(rows=16, batch=4, length=64, answer=answer)
    small = Shape(rows=1, batch=1, length=32, answer=answer)
    ours, theirs = first_losses(bench, answer)
    agree = abs(ours - theirs) <= LOSS_TOLERANCE * theirs
    targets = f"loss on {'every token' if answer == ALL_LABELS else f'the last {answer} tokens'}"
    print(
        f"{targets}: first loss ours {ours:.4f}, usual {theirs:.4f}: {'agree' if agree else 'DIFFER'}"
    )
    seconds = measure(
        {
            "usual 4x4x64": bench.usual_message(large),
            "ours 4x4x64": bench.ours(large),
            "bare steps 4x4x64": bench.bare_steps(large),
            "usual 1x1x32": bench.usual_message(small),
            "ours 1x1x32": bench.ours(small),
            "ours 8 clients 1x32": bench.ours(small, clients=8),
        },
        repeats,
    )
    for name, value in seconds.items():
        print(f"  {name:<22}{value:8.3f} CPU s")
    return {
        "ratio_4x4x64": seconds["usual 4x4x64"] / seconds["ours 4x4x64"],
        "ratio_1x1x32": seconds["usual 1x1x32"] / seconds["ours 1x1x32"],
        "ratio_cohort8_1x32": 8 * seconds["usual 1x1x32"] / seconds["ours 8 clients 1x32"],
        "overhead_4x4x64": seconds["ours 4x4x64"] / seconds["bare steps 4x4x64"],
    }


def report(ratios: dict[str, float]) -> None:
    """Print each gate and whether it is met."""
    print(f"{'':<38}{'measured':>10}{'gate':>10}")
    for name, value in ratios.items():
        sign, bound = GATES.get(name.removesuffix("_answer"), ("", 0.0))
        met = value >= bound if sign == ">=" else value <= bound
        print(f"{name:<38}{value:>10.3f}{sign:>5}{bound:>5g}  {'met' if met else 'not met'}")


def main() -> None:
    """Run the whole benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = QUICK_REPEATS if parser.parse_args().quick else REPEATS
    silence()
    bench = Bench()
    kernels = bench.backbone.kernels
    print(f"{kernels.dtype}, {kernels.attention} attention, 1 thread, {repeats} repeats in turns")
    ratios = time_ratios(bench, ALL_LABELS, repeats)
    answer = time_ratios(bench, ANSWER_TOKENS, repeats)
    ratios |= {f"{name}_answer": value for name, value in answer.items()}
    report(ratios)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
