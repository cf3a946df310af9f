"""Sample-level differential privacy: a step from clipped gradients of single rows, against a plain step.

    python benchmarks/private.py [--quick]

One client trains LoRA of rank 8 on the query and value projections of SmolLM2-135M, one step over 8 rows of 64 tokens
with a loss at every token. Named baselines: the plain step over the same rows, which is what privacy is paid on top
of; and the same private step with a pass for each row, the plain way to gradients of single rows. Ours is
`fedllm_flwr.training.local.train`, as a node calls it, with all 8 rows in one pass.

Costs are CPU seconds of the process on one thread, clipping, noise and set-up of the adapters included; the sides are
measured in turns, and a ratio is that of the medians.

The last line is one JSON object:
    dp_step_ratio: ours / plain step.
    dp_vs_loop_ratio: a pass for each row / ours.
    dp_difference: |ours - mean of clipped gradients| / |mean of clipped gradients| of a step without noise, in float32,
        the gradients being those of plain steps over one row each: whether both compute the same.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, layer_shapes
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.local import ClientJob, LocalResult, train
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy

ROWS, LENGTH = 8, 64
SPEC = LoraSpec(rank=8, alpha=16.0)
ADAPTER_SCALE = 0.02
"""Standard deviation of the start values of both factors, so that both have gradients."""
PLAIN = LocalSettings(
    batch_size=ROWS,
    local_steps=1,
    optimizer="sgd",
    learning_rate=1.0,
    cohort_tokens=ROWS * LENGTH,
)
PRIVATE = replace(PLAIN, sample_privacy=SamplePrivacy(clip_norm=1.0, noise_multiplier=1.0))
LONG = replace(PLAIN, learning_rate=1e4)
"""A step beside which the start values are nothing, so that it can be read off to its last bits."""
CLIPPED = replace(LONG, sample_privacy=SamplePrivacy(clip_norm=0.1, noise_multiplier=0.0))
"""Below the norms of the rows' gradients, which is checked."""
SIDES = {
    "plain step (baseline)": PLAIN,
    "private step, one pass": PRIVATE,
    "private step, a pass for each row (baseline)": replace(PRIVATE, cohort_tokens=0),
}
REPEATS, QUICK_REPEATS = 7, 5
GATES: dict[str, tuple[str, float]] = {
    "dp_step_ratio": ("<=", 1.5),
    "dp_vs_loop_ratio": (">=", 1.2),
    "dp_difference": ("<=", 1e-4),
}


def job_of(backbone: Backbone) -> ClientJob:
    """The client: as many rows as a step has, so that each is taken with probability 1."""
    draws = numpy_generator(21, "private")
    ids = draws.integers(0, len(backbone.head_weight()), (ROWS, LENGTH + 1), dtype=np.int32)
    rows = [
        Encoded(
            row_id=str(index),
            input_ids=tokens[:-1],
            predict_from=np.arange(LENGTH, dtype=np.int32),
            targets=tokens[1:],
            label=-1,
            characters=LENGTH,
        )
        for index, tokens in enumerate(ids)
    ]
    layout = AdapterLayout(layer_shapes(backbone.ref, SPEC.target_modules), SPEC.rank)
    values = ADAPTER_SCALE * draws.standard_normal(layout.size, dtype=np.float32)
    return ClientJob(0, rows, values, SPEC, seed=1)


def step(backbone: Backbone, job: ClientJob, settings: LocalSettings) -> LocalResult:
    """One step of the client."""
    [result] = train(backbone, [job], settings)
    assert not result.error, result.error
    return result


def measure(backbone: Backbone, repeats: int) -> dict[str, float]:
    """Median CPU seconds of a step of each side, in turns, after one of each to warm up."""
    job = job_of(backbone)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for repeat in range(repeats + 1):
        for name, settings in SIDES.items():
            gc.collect()
            began = time.process_time()
            step(backbone, job, settings)
            if repeat:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def difference(backbone: Backbone) -> float:
    """Relative distance of our step without noise from the mean of clipped plain steps over one row each."""
    job = job_of(backbone)
    privacy = CLIPPED.sample_privacy
    assert privacy is not None
    bound = CLIPPED.learning_rate * privacy.clip_norm
    alone = [
        job.adapter - step(backbone, replace(job, rows=[row]), LONG).adapter for row in job.rows
    ]
    norms = [float(np.linalg.norm(each)) for each in alone]
    assert min(norms) > bound, "the clip norm clips nothing"
    wanted = np.mean([each * (bound / norm) for each, norm in zip(alone, norms, strict=True)], 0)
    ours = job.adapter - step(backbone, job, CLIPPED).adapter
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def figures_of(fast: Backbone, wide: Backbone, repeats: int) -> dict[str, float]:
    """Everything that the last line holds.

    Args:
        fast: The model in the type that is timed.
        wide: The same model in float32.
        repeats: Measured steps of each side.
    """
    medians = measure(fast, repeats)
    plain, ours, loop = medians.values()
    print(f"{'':48}{'CPU ms':>8}{'this / plain':>14}")
    for name, seconds in medians.items():
        print(f"  {name:46}{seconds * 1e3:8.1f}{seconds / plain:14.2f}")
    return {
        "dp_step_ratio": ours / plain,
        "dp_vs_loop_ratio": loop / ours,
        "dp_difference": difference(wide),
    }


def report(figures: dict[str, float]) -> None:
    """Print each gate and whether it is met."""
    for name, (sign, bound) in GATES.items():
        met = figures[name] >= bound if sign == ">=" else figures[name] <= bound
        print(
            f"{name:<30}{figures[name]:>12.3g}{sign:>4}{bound:>8g}  {'met' if met else 'not met'}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the tiny test model, fewer repeats, no gates"
    )
    quick = parser.parse_args().quick
    repeats = QUICK_REPEATS if quick else REPEATS
    torch.set_num_threads(1)
    ref = ModelRef(name="tiny" if quick else "smollm2_135m")
    fast, wide = (load(ref, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    print(
        f"{ref.name}, {ROWS} rows of {LENGTH} tokens, {fast.kernels.dtype}, 1 thread, {repeats} repeats in turns"
    )
    figures = figures_of(fast, wide, repeats)
    if not quick:
        report(figures)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
