"""Memory and time of a training step: GRASS against AdamW on the same matrices, and what else trains a model.

    python benchmarks/memory.py [--quick] [--dtype bfloat16]

One client trains SmolLM2-135M: steps of 2 rows of 32 random tokens, each token but the first a target. Named
baseline: `torch.optim.AdamW` as it comes on all linear matrices of the decoder, through transformers and automatic
differentiation, all gradients held until its step; a second row has its fused kernel instead. All methods that change
weights train these same 210 matrices, a private copy of them each, under the same loss. The other rows are the
library's own, with its lean decoder; "AdamW, layer by layer" tells what of a ratio is the decoder's doing. GRASS and
GaLore choose their projection anew in the last measured step, which is printed apart.

Each method runs in a process of its own, one after the other and in turns over the repeats. Memory is the peak of
the resident set in all steps, less what is resident when the model is loaded and was run once, less the private copy
of the matrices, which is as large for every method that changes weights and is printed apart. Time is CPU seconds of
the process on one thread: the median of the steps between the first and the last, plus 1/200 of what the last one
takes beyond it, 200 being the refresh interval by default. Table and ratios are medians over repeats.

A second table sets predictions beside what was measured: by formula, from the shapes of the matrices alone, the bytes
that an optimizer holds between steps, those and the gradients that are held at a time, and the bytes of one client's
update. Measured are the optimizer's own tensors, the peak above, which has activations too, and the array of a real
answer.

The last line is one JSON object:
    grass_memory_ratio: AdamW's memory / GRASS's (64 rows, drawn by the gradient's row norms, Adam).
    grass_step_ratio: AdamW's CPU seconds of a step / GRASS's.
    grass_step_ratio_fused: the same with AdamW's fused kernel; no gate. Beyond its optimizer, AdamW does one more
        product for each matrix than GRASS, a third of all, so this ratio cannot be much above 1.5.
    grass_step_ratio_layered: the same with AdamW layer by layer in the lean decoder; no gate.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.memory_predictions import Matrices, Predicted, dense, galore, grass, lora, prompt
from fedllm_flwr import records
from fedllm_flwr.grass.galore import GaloreSettings
from fedllm_flwr.grass.optimizer import GrassSettings
from fedllm_flwr.grass.packing import pack
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import ALL_LINEAR, Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.prompt_start import prompt_width
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, collate
from fedllm_flwr.training.full import FullTrainer
from fedllm_flwr.training.full_job import FullJob, FullSettings
from fedllm_flwr.training.full_layers import weight_of
from fedllm_flwr.training.loop import forward_backward, make_optimizer
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import AdapterSpec, make_stack

ROWS, LENGTH = 2, 32
TARGETS = (ALL_LINEAR,)
LORA = LoraSpec(rank=8, alpha=16.0, target_modules=TARGETS)
PROMPT = PromptSpec((Segment("shared", 10),), "before")
RANK, REFRESH = 64, 8
LOCAL = LocalSettings(batch_size=ROWS, learning_rate=1e-4)
WARM = 1
STEPS = REFRESH
"""Measured after the first; the last one of them is a refresh."""
REPEATS, QUICK_REPEATS = 3, 1
BASELINE, GRASS = "AdamW, torch", "GRASS, gradient norms"
FUSED, LAYERED = "AdamW, torch, fused", "AdamW, layer by layer"
GATES = {"grass_memory_ratio": 5.0, "grass_step_ratio": 1.5}
MB = 1e6


@dataclass
class Training:
    """One method, ready to train.

    Attributes:
        step: Does one step.
        private_bytes: Of its copy of the matrices.
        state_bytes: Tells what its optimizers hold between steps.
        update: Makes what a client would send, float32 [n].
    """

    step: Callable[[], object]
    private_bytes: int
    state_bytes: Callable[[], int]
    update: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What one process found: bytes, and CPU seconds of each step."""

    loaded: int
    private: int
    state: int
    extra: int
    sent: int
    seconds: list[float]


Method = Callable[[Backbone, Share], Iterator[Training]]


def full(projection: GrassSettings | GaloreSettings | None, checkpointing: bool = False) -> Method:
    """A method of :mod:`fedllm_flwr.training.full`."""

    def method(backbone: Backbone, share: Share) -> Iterator[Training]:
        settings = FullSettings(local=LOCAL, projection=projection, checkpointing=checkpointing)
        trainer = FullTrainer(backbone, FullJob(0, share.rows, TARGETS, seed=1), settings)
        with trainer.active():
            step = lambda: trainer.step([share], None)  # noqa: E731
            update = lambda: pack(trainer.updates())  # noqa: E731
            yield Training(step, trainer.weight_bytes(), trainer.state_bytes, update)

    return method


def plain_adamw(backbone: Backbone, share: Share, fused: bool = False) -> Iterator[Training]:
    """The baseline."""
    layers: dict[str, nn.Module] = {}
    for name, shared in backbone.target_layers(TARGETS).items():
        layers[name] = layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.weight = nn.Parameter(weight_of(shared).clone())
        layer.bias = shared.bias
    parameters = [layer.weight for layer in layers.values()]
    rate = LOCAL.learning_rate
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=fused or None)

    def step() -> float:
        batch = collate([share], backbone.device)
        hidden = backbone.hidden(batch.input_ids)
        states = hidden.detach().requires_grad_()
        chosen = states.flatten(0, 1).index_select(0, batch.positions)
        loss = (backbone.row_losses(chosen, batch.targets) * batch.weights).sum()
        [slope] = torch.autograd.grad(loss, states)
        hidden.backward(slope)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    with backbone.swapped(layers):
        update = lambda: np.concatenate([p.detach().float().numpy().ravel() for p in parameters])  # noqa: E731
        yield Training(step, sum(p.nbytes for p in parameters), lambda: state_of(optimizer), update)


def adapter(spec: AdapterSpec, checkpointing: bool = False) -> Method:
    """An adapter over the frozen weights."""

    def method(backbone: Backbone, share: Share) -> Iterator[Training]:
        stack = make_stack(backbone, spec, 1, "both", checkpointing=checkpointing)
        draws = numpy_generator(2, "adapter").standard_normal(len(stack.read(0)))
        stack.load(0, (0.05 * draws).astype(np.float32))
        parameters = stack.parameters(0)
        optimizer = make_optimizer(parameters, LOCAL)

        def step() -> None:
            stack.bind([0], [0])
            forward_backward(backbone, stack, collate([share], backbone.device), None)
            optimizer.step()
            optimizer.zero_grad()

        with stack.active():
            yield Training(step, 0, lambda: state_of(optimizer), lambda: stack.read(0))

    return method


METHODS: dict[str, Method] = {
    BASELINE: plain_adamw,
    FUSED: partial(plain_adamw, fused=True),
    LAYERED: full(None),
    GRASS: full(GrassSettings(rank=RANK, rule="norm_nr", refresh_interval=REFRESH)),
    "GRASS, frozen pass": full(
        GrassSettings(rank=RANK, rule="frozen_pass", refresh_interval=REFRESH)
    ),
    "GRASS, checkpoints": full(
        GrassSettings(rank=RANK, rule="norm_nr", refresh_interval=REFRESH), checkpointing=True
    ),
    "GaLore": full(GaloreSettings(rank=RANK, refresh_interval=REFRESH)),
    "LoRA, rank 8": adapter(LORA),
    "LoRA, checkpoints": adapter(LORA, checkpointing=True),
    "soft prompt, 10 tokens": adapter(PROMPT),
    "prompt, checkpoints": adapter(PROMPT, checkpointing=True),
}


def predictions(matrices: Matrices, width: int) -> dict[str, Predicted]:
    """Of each method, for matrices of m outputs and n inputs."""
    rows, factors, soft = (
        grass(matrices, RANK),
        lora(matrices, LORA.rank),
        prompt(PROMPT.length, width),
    )
    every = dense(matrices, layered=False)
    return {
        BASELINE: every,
        FUSED: every,
        LAYERED: dense(matrices, layered=True),
        GRASS: rows,
        "GRASS, frozen pass": rows,
        "GRASS, checkpoints": rows,
        "GaLore": galore(matrices, RANK),
        "LoRA, rank 8": factors,
        "LoRA, checkpoints": factors,
        "soft prompt, 10 tokens": soft,
        "prompt, checkpoints": soft,
    }


def share_of(vocabulary: int) -> Share:
    """The rows."""
    draws = numpy_generator(3, "rows").integers(0, vocabulary, (ROWS, LENGTH))
    rows = [
        Encoded(
            row_id=str(index),
            input_ids=tokens.astype(np.int32),
            predict_from=np.arange(LENGTH - 1, dtype=np.int32),
            targets=tokens[1:].astype(np.int32),
            label=-1,
            characters=1,
        )
        for index, tokens in enumerate(draws)
    ]
    return Share(rows, 1.0 / (ROWS * (LENGTH - 1)))


def measure(backbone: Backbone, name: str, steps: int) -> Measured:
    """Train with one method in this process."""
    share = share_of(len(backbone.head_weight()))
    with torch.no_grad():  # brings every page of the weights in
        hidden = backbone.hidden(collate([share], backbone.device).input_ids).flatten(0, 1)
        backbone.row_losses(hidden[:1], torch.zeros(1, dtype=torch.int64))
    del hidden
    return_memory()
    loaded = status("VmRSS")
    with contextmanager(METHODS[name])(backbone, share) as training:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
        seconds = []
        for _ in range(WARM + steps):
            began = time.process_time()
            training.step()
            seconds.append(time.process_time() - began)
        extra = status("VmHWM") - loaded - training.private_bytes
        private, state = training.private_bytes, training.state_bytes()
    with contextmanager(METHODS[name])(backbone, share) as training:  # as a client of one step
        training.step()
        answer = records.answer({}, {"0/update": training.update()}, "float32", 1)
    sent = answer[records.ARRAYS][records.FLAT].numpy().nbytes
    return Measured(loaded, private, state, extra, sent, seconds[WARM:])


def status(field: str) -> int:
    """A size of this process in bytes, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def return_memory() -> None:
    """Give what was freed back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def state_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's moments."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.ndim)


def in_a_process(name: str, dtype: str, steps: int) -> Measured:
    """Measure a method in a process of its own."""
    arguments = ["--method", name, "--dtype", dtype, "--steps", str(steps)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def medians(found: list[Measured]) -> tuple[float, float, float]:
    """Over the repeats of a method: bytes, and CPU seconds of a step, refreshes shared out, and of a refresh."""
    steps, refreshes = [], []
    for one in found:
        *plain, refresh = one.seconds
        steady = statistics.median(plain)
        steps.append(steady + (refresh - steady) / GrassSettings().refresh_interval)
        refreshes.append(refresh)
    extra = statistics.median(one.extra for one in found)
    return extra, statistics.median(steps), statistics.median(refreshes)


def figures_of(found: dict[str, list[Measured]]) -> dict[str, float]:
    """Print the table; what the last line holds."""
    base_bytes, base_seconds, _ = medians(found[BASELINE])
    print(
        f"{'':26}{'weights':>8}{'state':>8}{'memory':>8}{'AdamW':>8}{'step':>8}{'AdamW':>8}{'last':>8}"
    )
    print(f"{'':26}{'MB':>8}{'MB':>8}{'MB':>8}{'/ this':>8}{'CPU ms':>8}{'/ this':>8}{'CPU ms':>8}")
    for name, measured in found.items():
        extra, seconds, refresh = medians(measured)
        first = measured[0]
        print(
            f"  {name:24}{first.private / MB:8.0f}{first.state / MB:8.1f}{extra / MB:8.0f}{base_bytes / extra:8.2f}"
            f"{seconds * 1e3:8.0f}{base_seconds / seconds:8.2f}{refresh * 1e3:8.0f}"
        )
    extra, seconds, _ = medians(found[GRASS])
    return {
        "grass_memory_ratio": base_bytes / extra,
        "grass_step_ratio": base_seconds / seconds,
        "grass_step_ratio_fused": medians(found[FUSED])[1] / seconds,
        "grass_step_ratio_layered": medians(found[LAYERED])[1] / seconds,
    }


def print_predictions(found: dict[str, list[Measured]]) -> None:
    """The second table."""
    ref = ModelRef(name="smollm2_135m")
    shapes = [(shape.out_features, shape.in_features) for shape in layer_shapes(ref, TARGETS)]
    told_of = predictions(shapes, prompt_width(ref))
    print(f"\n{'MB':26}{'state':>10}{'':>10}{'+gradient':>10}{'peak':>10}{'sent':>10}{'':>10}")
    print(f"{'':26}" + f"{'predicted':>10}{'measured':>10}" * 3)
    for name, measured in found.items():
        told, first = told_of[name], measured[0]
        pairs = (
            (told.state, first.state),
            (told.held, medians(measured)[0]),
            (told.sent, first.sent),
        )
        print(f"  {name:24}" + "".join(f"{a / MB:10.2f}{b / MB:10.2f}" for a, b in pairs))


def main() -> None:
    """Measure and print; with ``--method`` only one, in this process, as a line of JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        backbone = load(ModelRef(name="smollm2_135m"), dtype=options.dtype, device="cpu")
        print(json.dumps(asdict(measure(backbone, options.method, options.steps))))
        return
    repeats = QUICK_REPEATS if options.quick else REPEATS
    print(f"SmolLM2-135M, {ROWS} rows of {LENGTH} tokens, {options.dtype}, 1 thread")
    print(f"{repeats} repeats in turns, {STEPS} steps each; memory beyond model and weights copy")
    found: dict[str, list[Measured]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name in METHODS:
            found[name].append(in_a_process(name, options.dtype, STEPS))
    figures = figures_of(found)
    print_predictions(found)
    for name, bound in GATES.items():
        met = "met" if figures[name] >= bound else "not met"
        print(f"{name:<30}{figures[name]:>12.3g}  >={bound:>8g}  {met}")
    print(f"against torch's fused AdamW    {figures['grass_step_ratio_fused']:>11.3g}  no gate")
    print(f"against AdamW layer by layer   {figures['grass_step_ratio_layered']:>11.3g}  no gate")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
