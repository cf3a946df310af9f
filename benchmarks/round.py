"""CPU cost and memory of a client message: this project against a client written the usual way.

    python benchmarks/round.py [--quick]

The usual client (`usual_client.py`) rebuilds model, PEFT wrap and Trainer for each message; ours
(`our_client.py`) calls `fedllm_flwr.training.local.train` on a loaded backbone, adapter in and adapter out.
Both train the same rows of SmolLM2-135M with the same LoRA (r 8 on q_proj and v_proj), AdamW, clipping and
dtype, on one thread, and their first losses are compared. Costs are CPU seconds of the process, never wall
time; the sides are measured in turns, so that all meet the same load, and a ratio is that of the medians.

The last line is one JSON object:

- ``ratio_4x4x64``: usual / ours, 4 steps of 4 rows x 64 tokens;
- ``ratio_1x1x32``: usual / ours, 1 step of 1 row x 32 tokens;
- ``ratio_cohort8_1x32``: eight such messages / one call that trains eight clients together;
- ``overhead_4x4x64``: our message / its bare forward passes, backward passes and optimizer steps;
- ``second_worker_memory_ratio``: memory (PSS) that a second worker holds after a message, ours / usual;
- ``second_worker_peak_memory_ratio``: the same at its peak, while it trains;
- ``second_worker_private_weights``: bytes of its mapped weights that our second worker does not share.

These hold with a loss on every token. The first four come again with the suffix ``_answer``, for rows of
which only the last ``ANSWER_TOKENS`` tokens are targets, as in instruction tuning.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
from our_client import MODEL, OurClient
from second_worker import measure_second_worker
from usual_client import UsualClient, silence
from workload import ALL_LABELS, Shape

from fedllm_flwr.models.cache import converted

ANSWER_TOKENS = 8
LOSS_TOLERANCE = 5e-3
"""Relative. bfloat16 keeps 8 bits, and the two sides sum in another order; in float32 they agree to 1e-6."""
REPEATS, QUICK_REPEATS = 7, 3
GATES: dict[str, tuple[str, float]] = {
    "ratio_4x4x64": (">=", 2.0),
    "ratio_1x1x32": (">=", 5.0),
    "ratio_cohort8_1x32": (">=", 8.0),
    "overhead_4x4x64": ("<=", 1.15),
    "second_worker_memory_ratio": ("<=", 0.5),
    "second_worker_peak_memory_ratio": ("<=", 0.5),
    "second_worker_private_weights": ("<=", 0.0),
}


def usual_client(ours: OurClient) -> UsualClient:
    """The usual client with the same weights, dtype and start values."""
    kernels = ours.backbone.kernels
    state = {
        f"base_model.model.{name}.lora_{side}.weight": torch.from_numpy(value)
        for name, factors in ours.factors.items()
        for side, value in (("A", factors.lora_a), ("B", factors.lora_b))
    }
    return UsualClient(converted(MODEL, kernels.dtype), kernels.torch_dtype, state)


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


def time_ratios(ours: OurClient, usual: UsualClient, answer: int, repeats: int) -> dict[str, float]:
    """The four ratios of CPU time for one kind of labels; prints the seconds."""
    kind = "every token" if answer == ALL_LABELS else f"the last {answer} tokens"
    step = Shape(rows=4, batch=4, length=64, answer=answer)
    our_loss, usual_loss = ours.message(step)()[0].first_loss, usual.message(step)()
    agree = abs(our_loss - usual_loss) <= LOSS_TOLERANCE * usual_loss
    print(
        f"loss on {kind}; of the first step ours {our_loss:.4f}, usual {usual_loss:.4f}", end=": "
    )
    print("the same work" if agree else "NOT THE SAME WORK")
    large = Shape(rows=16, batch=4, length=64, answer=answer)
    small = Shape(rows=1, batch=1, length=32, answer=answer)
    seconds = measure(
        {
            "usual, 4 steps of 4x64": usual.message(large),
            "ours, 4 steps of 4x64": ours.message(large),
            "bare 4 steps of 4x64": ours.bare_steps(large),
            "frozen products of 4 x 4x64": ours.frozen_products(large),
            "usual, 1 step of 1x32": usual.message(small),
            "ours, 1 step of 1x32": ours.message(small),
            "ours, 8 clients of 1x32": ours.message(small, clients=8),
            "frozen products of 1 x 1x32": ours.frozen_products(small),
        },
        repeats,
    )
    for name, value in seconds.items():
        print(f"  {name:<30}{value:8.3f} CPU s")
    usual_large, our_large, bare, floor_large = list(seconds.values())[:4]
    usual_small, our_small, cohort, floor_small = list(seconds.values())[4:]
    print(
        "  no client that multiplies by the frozen weights can have a ratio above "
        f"{usual_large / floor_large:.2f} (4x4x64) and {usual_small / floor_small:.2f} (1x1x32) here"
    )
    return {
        "ratio_4x4x64": usual_large / our_large,
        "ratio_1x1x32": usual_small / our_small,
        "ratio_cohort8_1x32": 8 * usual_small / cohort,
        "overhead_4x4x64": our_large / bare,
    }


def memory_ratio(usual: UsualClient) -> dict[str, float]:
    """Memory that a second worker adds, ours / usual; prints both."""
    dtype = str(usual.dtype).removeprefix("torch.")
    added = {
        "ours": measure_second_worker("our_client.py"),
        "usual": measure_second_worker("usual_client.py", str(usual.folder), dtype),
    }
    for kind, value in added.items():
        print(
            f"  second worker, {kind:<6} peak {value.peak / 2**20:5.0f} MB, after the message "
            f"{value.resting / 2**20:5.0f} MB, private weights {value.weights_private} B"
        )
    return {
        "second_worker_memory_ratio": added["ours"].resting / added["usual"].resting,
        "second_worker_peak_memory_ratio": added["ours"].peak / added["usual"].peak,
        "second_worker_private_weights": float(added["ours"].weights_private),
    }


def report(ratios: dict[str, float]) -> None:
    """Print each gate and whether it is met."""
    print(f"{'':<34}{'measured':>10}{'gate':>10}")
    for name, value in ratios.items():
        sign, bound = GATES[name.removesuffix("_answer")]
        met = value >= bound if sign == ">=" else value <= bound
        print(f"{name:<34}{value:>10.3f}{sign:>5}{bound:>5g}  {'met' if met else 'not met'}")


def main() -> None:
    """Run the whole benchmark."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = QUICK_REPEATS if parser.parse_args().quick else REPEATS
    silence()
    ours = OurClient()
    usual = usual_client(ours)
    kernels = ours.backbone.kernels
    print(f"{kernels.dtype}, {kernels.attention} attention, 1 thread, {repeats} repeats in turns")
    ratios = time_ratios(ours, usual, ALL_LABELS, repeats)
    answer = time_ratios(ours, usual, ANSWER_TOKENS, repeats)
    ratios |= memory_ratio(usual)
    ratios |= {f"{name}_answer": value for name, value in answer.items()}
    report(ratios)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
