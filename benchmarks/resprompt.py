"""Prompts from a reservoir: batched split exchanges against the package that introduced them.

    pip install --no-deps esnfed==1.7.1 networkx
    python benchmarks/resprompt.py [--quick]

One client with a reservoir of 200 nodes learns to name the next value's quantile of a Mackey-Glass series: a context of
30 steps becomes a state, a bottleneck of 16 and a prompt of 10 tokens of width 576; a linear surrogate of a language
model gives loss and gradient; plain SGD follows. Named baseline: esnfed 1.7.1, ``split_federated_step`` on the same
weights, contexts and targets. It takes one example at a time in float64, and a step after each; with numba installed,
which it uses by itself, its reservoir is somewhat faster, and the head line says whether it is there. It needs
networkx, which torch brings.

Ours are the classes of `fedllm_flwr.reservoir` in float32 on batches, with one step for each batch. All batch sizes
are printed: with 1, both take the same steps, and `surrogate_difference` says whether they come to the same values.
Every measured pass computes its contexts' states anew, all together, as no step changes them; a client whose contexts
do not change keeps them after the first pass, which is the cached figure. Costs are CPU seconds of the process on one
thread; the sides are measured in turns, and rates are those of the medians.

The second part puts SmolLM2-135M in the surrogate's place, in float32 on both sides and with one setting of torch's
float32 products for both. Named baseline: esnfed's `TransformersLM` with its cross-entropy over the class tokens alone,
one prompt at a time. Ours: `ServerHalf` with the same four tokens, 64 prompts an exchange. The same with a
cross-entropy over the whole vocabulary, again on both sides, is printed beside it.

The last line is one JSON object:
    surrogate_ratio: our examples per second / the baseline's, with batches of 32.
    surrogate_examples_per_second, surrogate_baseline_examples_per_second: both rates.
    surrogate_ratio_single: the same with batches of 1.
    surrogate_ratio_cached: the same with batches of 32 and the states there already.
    surrogate_difference: largest |ours - baseline| of any loss and of any value of W_out and P after the same steps
        one by one, in float64.
    real_lm_ratio: our examples per second / the baseline's, cross-entropy over four tokens on both sides.
    real_lm_examples_per_second, real_lm_baseline_examples_per_second: both rates.
    real_lm_ratio_full_head: the same ratio with the whole vocabulary on both sides.
    real_lm_median_difference: |ours - baseline| / |baseline| of the gradient of a prompt, the median over eight of
        them. The gate is on this one: it says that most prompts agree, not that all do.
    real_lm_largest_difference: the largest of the eight, without a gate. It was gated at first, and one prompt of the
        eight did not meet 1e-4; nothing here tells which side is nearer to float64.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from esnfed.esn import EchoStateNetwork
from esnfed.llm_orchestration import EdgeClient, Server, TransformersLM, split_federated_step
from esnfed.llm_orchestration import SurrogateLM as BaselineLM
from threadpoolctl import threadpool_limits
from torch import Tensor

from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.reservoir import Controller, ControllerSpec, Reservoir, ReservoirSpec, SurrogateLM
from fedllm_flwr.reservoir.network import Precision, spectral_radius
from fedllm_flwr.reservoir.series import classes_of, mackey_glass, quantile_edges, windows
from fedllm_flwr.training.server_half import ServerHalf

STEPS, CLASSES, RATE = 30, 4, 0.05
RESERVOIR = ReservoirSpec(size=200, leak=0.5)
CONTROLLER = ControllerSpec(RESERVOIR.readout_size, bottleneck=16, prompt_length=10, width=576)
EXAMPLES, BASELINE_EXAMPLES = 256, 64
"""Examples of one measured pass of each side."""
BATCHES, NAMED_BATCH = (1, 8, 32, 128), 32
WORDS = (260, 197, 372, 87)
"""Tokens of the real model that stand for the classes."""
LM_EXAMPLES, LM_BASELINE_EXAMPLES, LM_REPEATS = 64, 8, 7
"""Of the real model: examples of one measured pass of each side, and measured passes at most."""
REPEATS, QUICK_REPEATS = 15, 3
GATES: dict[str, tuple[str, float]] = {
    "surrogate_ratio": (">=", 10.0),
    "surrogate_difference": ("<=", 1e-9),
    "real_lm_ratio": (">=", 5.0),
    "real_lm_median_difference": ("<=", 1e-4),
}
UNGATED = ("real_lm_largest_difference",)
"""Figures that are shown with the gates but held to none."""
Pass = Callable[[], object]


@dataclass(frozen=True)
class Examples:
    """What a client has.

    Attributes:
        contexts: float64 [n, T, 1].
        targets: int64 [n].
    """

    contexts: Tensor
    targets: Tensor


def examples(count: int) -> Examples:
    """Windows of a Mackey-Glass series and the quantile of the value that follows each."""
    contexts, values = windows(mackey_glass(count + STEPS, seed=1), STEPS)
    targets = classes_of(values, quantile_edges(values, CLASSES))
    return Examples(torch.from_numpy(contexts.copy()), torch.from_numpy(targets))


class Ours:
    """A client and its server in batches.

    Args:
        precision: Of everything that is computed.
        model: The server's; by default a surrogate.
    """

    def __init__(self, precision: Precision, model: ServerHalf | None = None) -> None:
        self.reservoir = Reservoir(RESERVOIR, precision=precision)
        start = CONTROLLER.start(seed=2)
        self.controller = Controller(
            CONTROLLER, start.double() if precision == "float64" else start
        )
        self.optimizer = self.controller.optimizer("sgd", RATE)
        self.model = model or SurrogateLM(CLASSES, CONTROLLER.width, seed=3)

    def exchange(self, z: Tensor, targets: Tensor) -> Tensor:
        """One exchange of a batch: prompts up, gradients down, one step; gives the losses [B]."""
        b, prompts = self.controller.prompts(z)
        loss, gradient = self.model.loss_and_gradient(prompts, targets)
        self.controller.step(self.optimizer, self.controller.gradient(z, b, gradient))
        return loss

    def train(self, rows: Examples, batch: int) -> Tensor:
        """One pass over the examples, all states first, which no step changes; gives the losses [n]."""
        return self.train_cached(self.reservoir.harvest(rows.contexts), rows.targets, batch)

    def train_cached(self, z: Tensor, targets: Tensor, batch: int) -> Tensor:
        """The same from states [n, R] that are there already."""
        parts = zip(z.split(batch), targets.split(batch), strict=True)
        return torch.cat([self.exchange(*part) for part in parts])


class Baseline:
    """The same client and server in esnfed, from the same values.

    Args:
        start: Whose reservoir, start values and surrogate to take.
        model: The server's in place of the surrogate.
    """

    def __init__(self, start: Ours, model: Any = None) -> None:
        recurrent, inputs = start.reservoir.weights, start.reservoir.input_weights
        esn = EchoStateNetwork(
            n_inputs=1,
            n_outputs=1,
            reservoir=recurrent,
            spectral_radius=spectral_radius(recurrent),  # so that it rescales by 1
            leaking_rate=RESERVOIR.leaks[0],
            input_weights=inputs,
        )
        spec = CONTROLLER
        self.client = EdgeClient(
            esn, spec.bottleneck, spec.width, n_prompt_tokens=spec.prompt_length, lr=RATE
        )
        self.client.W_out = start.controller.readout.double().numpy().copy()
        self.client.projection.P = start.controller.lift.double().numpy().copy()
        if model is None:
            assert isinstance(start.model, SurrogateLM)
            model = BaselineLM(CLASSES, spec.width)
            model.U = start.model.weights.double().numpy()
        self.server = Server(model)

    def train(self, rows: Examples) -> list[float]:
        """One pass, example by example; gives the losses."""
        return [
            split_federated_step(self.client, self.server, context, int(target))
            for context, target in zip(rows.contexts.numpy(), rows.targets, strict=True)
        ]


def difference(count: int) -> float:
    """Largest difference of losses and trained values after ``count`` examples one by one, in float64."""
    rows, ours = examples(count), Ours("float64")
    baseline = Baseline(ours)
    losses = ours.train(rows, batch=1).numpy() - np.array(baseline.train(rows))
    values = (
        ours.controller.readout.numpy() - baseline.client.W_out,
        ours.controller.lift.numpy() - baseline.client.projection.P,
    )
    return float(max(np.abs(part).max() for part in (losses, *values)))


def rates_of(passes: Mapping[str, tuple[int, Pass]], repeats: int) -> dict[str, float]:
    """Examples per CPU second of passes that are run in turns, after one of each to warm up.

    Args:
        passes: Name -> examples of a pass, and the pass.
        repeats: Measured passes of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):
        for name, (_, call) in passes.items():
            gc.collect()
            began = time.process_time()
            call()
            if repeat:
                seconds[name].append(time.process_time() - began)
    return {name: passes[name][0] / statistics.median(seconds[name]) for name in passes}


def surrogate(repeats: int) -> dict[str, float]:
    """The figures against the linear surrogate.

    Args:
        repeats: Measured passes of each side.
    """
    rows, few = examples(EXAMPLES), examples(BASELINE_EXAMPLES)
    ours, baseline = Ours("float32"), Baseline(Ours("float32"))
    states = ours.reservoir.harvest(rows.contexts)
    passes: dict[str, tuple[int, Pass]] = {
        "esnfed, one by one (baseline)": (len(few.targets), lambda: baseline.train(few))
    }
    for batch in BATCHES:
        call = _bound(ours.train, rows, batch)
        passes[f"ours, batches of {batch}"] = (len(rows.targets), call)
    cached = _bound(ours.train_cached, states, rows.targets, NAMED_BATCH)
    passes[f"ours, batches of {NAMED_BATCH}, cached states"] = (len(rows.targets), cached)
    rates = rates_of(passes, repeats)
    base, *_ = rates.values()
    print(f"{'surrogate model':44}{'examples/CPU s':>16}{'this / baseline':>18}")
    for name, rate in rates.items():
        print(f"  {name:42}{rate:16,.0f}{rate / base:18.2f}")
    named = rates[f"ours, batches of {NAMED_BATCH}"]
    return {
        "surrogate_ratio": named / base,
        "surrogate_examples_per_second": named,
        "surrogate_baseline_examples_per_second": base,
        "surrogate_ratio_single": rates["ours, batches of 1"] / base,
        "surrogate_ratio_cached": rates[f"ours, batches of {NAMED_BATCH}, cached states"] / base,
        "surrogate_difference": difference(BASELINE_EXAMPLES),
    }


class BaselineHead:
    """esnfed's real model as its server calls it, with a cross-entropy over ``WORDS`` or over the vocabulary."""

    def __init__(self, model: TransformersLM, *, restricted: bool) -> None:
        self._model, self._restricted = model, restricted

    def loss_and_grad(self, prompt: np.ndarray, target: int) -> Any:
        """Loss and gradient [m, d] of one prompt [m, d]; the target is a place in ``WORDS``."""
        if self._restricted:
            return self._model.restricted_loss_and_grad(prompt, WORDS, target)
        return self._model.loss_and_grad(prompt, WORDS[target])

    def forward_flops(self, n_tokens: int) -> int:
        """Not counted, as in the package."""
        return 0


def lm_differences(half: ServerHalf, head: BaselineHead) -> tuple[float, float]:
    """|ours - baseline| / |baseline| of the gradients of the same prompts: the median prompt's and the largest."""
    rows, ours = examples(LM_BASELINE_EXAMPLES), Ours("float32", half)
    _, prompts = ours.controller.prompts(ours.reservoir.harvest(rows.contexts))
    _, found = half.loss_and_gradient(prompts, rows.targets)
    shares = []
    for prompt, target, own in zip(prompts.numpy(), rows.targets.tolist(), found, strict=True):
        wanted = torch.from_numpy(head.loss_and_grad(prompt, target)[1])
        shares.append(float((own - wanted).norm() / wanted.norm()))
    return statistics.median(shares), max(shares)


def real_lm(repeats: int) -> dict[str, float]:
    """The figures against the real language model.

    Args:
        repeats: Measured passes of each side; ``LM_REPEATS`` at most.
    """
    ref = ModelRef(name="smollm2_135m")
    plain = TransformersLM(str(converted(ref, "float32")))
    backbone = load(ref, dtype="float32", device="cpu")  # sets how torch multiplies, for both
    rows, few = examples(LM_EXAMPLES), examples(LM_BASELINE_EXAMPLES)
    in_full = Examples(rows.contexts, torch.tensor(WORDS)[rows.targets])
    halves = (ServerHalf(backbone, token_ids=WORDS), ServerHalf(backbone))
    heads = [BaselineHead(plain, restricted=restricted) for restricted in (True, False)]
    ours = [Ours("float32", half) for half in halves]
    theirs = [Baseline(Ours("float32"), head) for head in heads]
    batch, one = LM_EXAMPLES, LM_BASELINE_EXAMPLES
    passes: dict[str, tuple[int, Pass]] = {
        "esnfed, one by one, 4 tokens (baseline)": (one, lambda: theirs[0].train(few)),
        f"ours, batches of {batch}, 4 tokens": (batch, _bound(ours[0].train, rows, batch)),
        "esnfed, one by one, vocabulary": (one, lambda: theirs[1].train(few)),
        f"ours, batches of {batch}, vocabulary": (batch, _bound(ours[1].train, in_full, batch)),
    }
    rates = rates_of(passes, min(repeats, LM_REPEATS))
    median, largest = lm_differences(halves[0], heads[0])
    base, named, base_full, full = rates.values()
    print(f"{'SmolLM2-135M, float32':44}{'examples/CPU s':>16}{'this / baseline':>18}")
    for name, rate in rates.items():
        print(f"  {name:42}{rate:16,.2f}{rate / base:18.2f}")
    return {
        "real_lm_ratio": named / base,
        "real_lm_examples_per_second": named,
        "real_lm_baseline_examples_per_second": base,
        "real_lm_ratio_full_head": full / base_full,
        "real_lm_median_difference": median,
        "real_lm_largest_difference": largest,
    }


PARTS: tuple[Callable[[int], dict[str, float]], ...] = (surrogate, real_lm)
"""What is measured: each part takes the repeats, prints its table and gives its figures."""


def report(figures: Mapping[str, float]) -> None:
    """Print each gate and whether it is met, and what has none."""
    for name, (sign, bound) in GATES.items():
        met = figures[name] >= bound if sign == ">=" else figures[name] <= bound
        print(
            f"{name:<30}{figures[name]:>12.3g}{sign:>4}{bound:>8g}  {'met' if met else 'not met'}"
        )
    for name in UNGATED:
        print(f"{name:<30}{figures[name]:>12.3g}  no gate")


def figures_of(repeats: int) -> dict[str, float]:
    """Everything that the last line holds, measured on one thread."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with threadpool_limits(1):
        for part in PARTS:
            figures |= part(repeats)
    return figures


def _bound(call: Callable[..., Tensor], *arguments: object) -> Pass:
    return lambda: call(*arguments)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = QUICK_REPEATS if parser.parse_args().quick else REPEATS
    numba = "with" if importlib.util.find_spec("numba") else "without"
    spec = CONTROLLER
    print(f"N {RESERVOIR.size}, {STEPS} steps, {spec.prompt_length} tokens of width {spec.width}")
    print(f"esnfed 1.7.1 {numba} numba, 1 thread, {repeats} repeats in turns")
    figures = figures_of(repeats)
    report(figures)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
