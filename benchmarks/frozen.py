"""An epoch of LoRA in the upper third of the blocks: with what lies below kept, against computing it in every epoch.

    python benchmarks/frozen.py [--quick]

One client trains 16 rows of 96 tokens with one label each, in batches of 8, on SmolLM2-135M; its adapters are on q, k,
v and o of the last 10 of 30 blocks. Named baseline: the same library with `runtime.state_cache_mib=0`. The first epoch
has to compute every row below the adapters too, one by one; later ones find them. Costs are CPU seconds of the process
on one thread; the sides are measured in turns, and a ratio is that of the medians.

The last line is one JSON object:
    later_epoch_ratio: baseline / an epoch whose rows are kept.
    first_epoch_ratio: baseline / an epoch that begins with nothing kept.
    difference: |adapter - baseline's| / |step|, after an epoch of SGD in float32.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, initial_factors, layer_shapes
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.frozen_states import keep_at_most
from fedllm_flwr.training.local import ClientJob, train
from fedllm_flwr.training.settings import LocalSettings

ROWS, LENGTH, BATCH = 16, 96, 8
HEAD = (260, 197, 372, 87)
"""Four tokens that stand for label words; the loss is restricted to them."""
UPPER_THIRD = ("*.layers.2[0-9].self_attn.[qkvo]_proj",)
KEPT_MIB = 256
EPOCH = LocalSettings(
    batch_size=BATCH, local_epochs=1, optimizer="sgd", learning_rate=0.1, cohort_tokens=0
)
REPEATS, QUICK_REPEATS = 9, 3
Epoch = Callable[[], np.ndarray]


def job_of(backbone: Backbone, targets: tuple[str, ...] = UPPER_THIRD) -> ClientJob:
    """The client: random tokens, and an adapter whose B is not zero."""
    spec = LoraSpec(rank=8, alpha=16.0, target_modules=targets)
    shapes = layer_shapes(backbone.ref, targets)
    draws = numpy_generator(21, "rows")
    tokens = draws.integers(0, len(backbone.head_weight()), (ROWS, LENGTH)).astype(np.int32)
    rows = [
        Encoded(
            row_id=str(index),
            input_ids=row,
            predict_from=np.array([LENGTH - 1], dtype=np.int32),
            targets=np.array([index % len(HEAD)], dtype=np.int32),
            label=index % len(HEAD),
            characters=1,
        )
        for index, row in enumerate(tokens)
    ]
    layout = AdapterLayout(shapes, spec.rank)
    start = layout.pack(initial_factors(shapes, spec, 0))
    start += 0.01 * draws.standard_normal(layout.size).astype(np.float32)
    return ClientJob(0, rows, start, spec, seed=0)


def sides(backbone: Backbone, job: ClientJob) -> dict[str, Epoch]:
    """What is measured in turns; each gives the adapter after its epoch."""

    def epoch(mib: int, *, forget: bool) -> np.ndarray:
        if forget:
            keep_at_most(0)
        keep_at_most(mib)
        [result] = train(backbone, [job], EPOCH, head_token_ids=HEAD)
        assert not result.error, result.error
        return result.adapter

    return {
        "every block in every epoch (baseline)": lambda: epoch(0, forget=True),
        "first epoch, nothing kept yet": lambda: epoch(KEPT_MIB, forget=True),
        "later epoch": lambda: epoch(KEPT_MIB, forget=False),
    }


def measure(backbone: Backbone, job: ClientJob, repeats: int) -> dict[str, float]:
    """Median CPU seconds of an epoch of each kind, in turns, after one of each to warm up."""
    calls = sides(backbone, job)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            gc.collect()
            began = time.process_time()
            call()
            if repeat:
                seconds[name].append(time.process_time() - began)
    keep_at_most(0)
    return {name: statistics.median(values) for name, values in seconds.items()}


def difference(backbone: Backbone, job: ClientJob) -> float:
    """How far an epoch over kept rows ends from the baseline's, in units of its step."""
    wanted, _, found = (call() for call in sides(backbone, job).values())
    keep_at_most(0)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - job.adapter))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = QUICK_REPEATS if parser.parse_args().quick else REPEATS
    ref = ModelRef(name="smollm2_135m")
    backbone = load(ref, device="cpu")
    job = job_of(backbone)
    print(f"{ROWS} rows of {LENGTH} tokens, {backbone.kernels.dtype}, 1 thread, {repeats} repeats")
    medians = measure(backbone, job, repeats)
    baseline, first, later = medians.values()
    print(f"{'':44}{'CPU s':>8}{'baseline / this':>18}")
    for name, seconds in medians.items():
        print(f"  {name:42}{seconds:8.2f}{baseline / seconds:18.2f}")
    figures = {
        "later_epoch_ratio": baseline / later,
        "first_epoch_ratio": baseline / first,
        "difference": difference(load(ref, dtype="float32", device="cpu"), job),
    }
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
