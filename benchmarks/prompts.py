"""One round of soft prompts for a cohort: trained together behind a cached text, against client by client.

    python benchmarks/prompts.py [--quick]

Eight clients train a prompt of 8 soft tokens on SmolLM2-135M: one step of 2 rows each, a row being 48 tokens of fixed
text, the prompt, and 8 further tokens of its own, the last of which predicts a label. Named baseline: the same
library without its two ideas, so clients train one after the other and compute the fixed text in every pass. It is
the same lean decoder on the same rows. A second baseline does that through transformers and automatic
differentiation, as a plain client would; its ratio is printed and has no gate.

Ours is `fedllm_flwr.training.local.train`, as a node calls it. The keys and values of the text are computed in every
measured call, as in the first round; in later rounds they are there already, which is also printed. Costs are CPU
seconds of the process on one thread; the sides are measured in turns, and a ratio is that of the medians. Gradients
are read off one step of SGD with rate 1: start minus end.

The last line is one JSON object:
    cohort8_ratio: first baseline / ours.
    cohort8_ratio_warm: the same with the text's keys and values there already.
    cohort8_ratio_transformers: second baseline / ours.
    gradient_difference: |ours - first baseline| / |first baseline|, the worst client's, in float64: whether both
        compute the same. What is left comes from the norms and the softmax of transformers, which compute the text's
        keys and values and stay in float32; the model amplifies it. In narrower types it amplifies every rounding,
        for some inputs a thousandfold; the printed figures show that on both sides.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.decoder import LeanDecoder
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.local import ClientJob, train
from fedllm_flwr.training.loop import Trainee, run
from fedllm_flwr.training.prompt_stacks import PromptStack
from fedllm_flwr.training.settings import LocalSettings

CLIENTS, ROWS = 8, 2
FIXED, SOFT, OWN = 48, 8, 8
"""Tokens of a row: of the fixed text, of the prompt, and its own."""
HEAD = (260, 197, 372, 87)
"""Four tokens that stand for label words; the loss is restricted to them."""
PROMPT_SCALE = 0.14
"""Standard deviation of the prompts' start values, near that of the model's token embeddings."""
SPEC = PromptSpec((Segment("shared", SOFT),), "after")
STEP = LocalSettings(batch_size=ROWS, local_steps=1, optimizer="sgd", learning_rate=1.0)
REPEATS, QUICK_REPEATS = 15, 3
GATES: dict[str, tuple[str, float]] = {
    "cohort8_ratio": (">=", 2.5),
    "gradient_difference": ("<=", 1e-4),
}
Text = tuple[int, ...]
Round = Callable[[Text], list[np.ndarray]]


def texts(backbone: Backbone, count: int) -> list[Text]:
    """Fixed texts of random tokens: a new one finds no keys and values."""
    draws = numpy_generator(11, "texts").integers(0, _vocabulary(backbone), (count, FIXED))
    return [tuple(int(token) for token in text) for text in draws]


def jobs_of(backbone: Backbone, text: Text) -> list[ClientJob]:
    """The clients, with rows behind a text."""
    found = []
    for client in range(CLIENTS):
        draws = numpy_generator(12, "client", client)
        own = draws.integers(0, _vocabulary(backbone), (ROWS, OWN))
        rows = [
            Encoded(
                row_id=f"{client}/{index}",
                input_ids=np.array([*text, *tokens], dtype=np.int32),
                predict_from=np.array([FIXED + OWN - 1], dtype=np.int32),
                targets=np.array([index % len(HEAD)], dtype=np.int32),
                label=index % len(HEAD),
                characters=1,
            )
            for index, tokens in enumerate(own)
        ]
        size = SOFT * backbone.hidden_size
        start = PROMPT_SCALE * draws.standard_normal(size, dtype=np.float32)
        found.append(ClientJob(client, rows, start, SPEC, seed=client))
    return found


def together(backbone: Backbone) -> Round:
    """Ours: gradients of all clients after one call."""

    def ours(text: Text) -> list[np.ndarray]:
        jobs = jobs_of(backbone, text)
        results = train(backbone, jobs, STEP, head_token_ids=HEAD, fixed_ids=text)
        assert not any(result.error for result in results)
        return [job.adapter - result.adapter for job, result in zip(jobs, results, strict=True)]

    return ours


def one_by_one(backbone: Backbone, decoder: LeanDecoder | None) -> Round:
    """A baseline: gradients of clients that train by themselves and compute the whole text.

    Args:
        backbone: The model.
        decoder: The lean decoder; None for transformers and automatic differentiation.
    """

    def baseline(text: Text) -> list[np.ndarray]:
        gradients = []
        for job in jobs_of(backbone, text):
            stack = PromptStack(backbone, SPEC, 1, fixed_ids=text, decoder=decoder, reuse=False)
            stack.load(0, job.adapter)
            parameters = stack.parameters(0)
            trainee = Trainee(0, job.rows, parameters, settings=STEP, seed=job.seed)
            run(backbone, stack, [trainee], HEAD)
            gradients.append(job.adapter - stack.read(0))
        return gradients

    return baseline


def measure(backbone: Backbone, repeats: int) -> dict[str, float]:
    """Median CPU seconds of a round of each kind, in turns, after one of each to warm up."""
    ours = together(backbone)
    rounds = {
        "client by client, whole text (baseline)": one_by_one(backbone, find_decoder(backbone)),
        "cohort behind a text not seen before": ours,
        "cohort behind a cached text": ours,
        "client by client, transformers": one_by_one(backbone, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for repeat, text in enumerate(texts(backbone, repeats + 1)):
        for name, call in rounds.items():
            gc.collect()
            began = time.process_time()
            call(text)
            if repeat:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def differences(found: list[np.ndarray], wanted: list[np.ndarray]) -> list[float]:
    """Per client, the norm of the difference over the norm of what is wanted."""
    return [
        float(np.linalg.norm(own - other) / np.linalg.norm(other))
        for own, other in zip(found, wanted, strict=True)
    ]


def in_float64(backbone: Backbone) -> Backbone:
    """A copy of a model that computes in float64."""
    model = copy.deepcopy(backbone.model).double()
    return replace(backbone, model=model, attached={}, _head_rows={}, _places={})


def gradient_difference(*narrow: Backbone) -> float:
    """Ours against the first baseline in float64; prints both in narrower types against the same.

    Args:
        narrow: The model in narrower types; the last one becomes the float64 model.
    """
    exact = in_float64(narrow[-1])
    [text] = texts(exact, 1)
    wanted = one_by_one(exact, find_decoder(exact))(text)
    found = differences(together(exact)(text), wanted)
    print(f"{'Gradients against those of the baseline in float64':44}")
    print(f"{'relative norm':44}{'median client':>14}{'worst client':>14}")
    rows = {"ours, float64": found}
    for backbone in narrow:
        for name, side in (
            ("baseline", one_by_one(backbone, find_decoder(backbone))),
            ("ours", together(backbone)),
        ):
            rows[f"{name}, {backbone.kernels.dtype}"] = differences(side(text), wanted)
    for name, values in rows.items():
        print(f"  {name:42}{statistics.median(values):14.1e}{max(values):14.1e}")
    return max(found)


def report(figures: dict[str, float]) -> None:
    """Print each gate and whether it is met."""
    for name, (sign, bound) in GATES.items():
        met = figures[name] >= bound if sign == ">=" else figures[name] <= bound
        print(
            f"{name:<30}{figures[name]:>12.3g}{sign:>4}{bound:>8g}  {'met' if met else 'not met'}"
        )


def figures_of(fast: Backbone, wide: Backbone, repeats: int) -> dict[str, float]:
    """Everything that the last line holds.

    Args:
        fast: The model in the type that is timed.
        wide: The same model in float32.
        repeats: Measured rounds of each kind.
    """
    medians = measure(fast, repeats)
    baseline, ours, warm, plain = medians.values()
    print(f"{'':44}{'CPU ms':>8}{'baseline / this':>18}")
    for name, seconds in medians.items():
        print(f"  {name:42}{seconds * 1e3:8.0f}{baseline / seconds:18.2f}")
    return {
        "cohort8_ratio": baseline / ours,
        "cohort8_ratio_warm": baseline / warm,
        "cohort8_ratio_transformers": plain / ours,
        "gradient_difference": gradient_difference(fast, wide),
    }


def _vocabulary(backbone: Backbone) -> int:
    return len(backbone.head_weight())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = QUICK_REPEATS if parser.parse_args().quick else REPEATS
    ref = ModelRef(name="smollm2_135m")
    fast, wide = (load(ref, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    print(f"{CLIENTS} clients, {ROWS} rows of {FIXED} fixed + {SOFT} soft + {OWN} own tokens")
    print(f"{fast.kernels.dtype}, 1 thread, {repeats} repeats in turns")
    figures = figures_of(fast, wide, repeats)
    report(figures)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
