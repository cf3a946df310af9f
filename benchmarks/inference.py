"""Generation: many prompts in one batch, a shared beginning, several samples of one prompt.

    python benchmarks/inference.py [--quick]

32 prompts of about 119 tokens, of which all begin with the same 95, each answered greedily with 16 new tokens by
SmolLM2-135M in float32, and five sampled answers to one of them. Named baseline: the same prompts one after the other
by transformers' own `generate` with a key-value cache, its default attention and float32 products, no padding. A second
baseline is our own loop, one prompt at a time; its ratios are printed and have no gate.

Costs are CPU seconds of the process on one thread. The prompts of the baselines are measured in parts, and between the
parts the batches, so that all sides see the same machine. No token ends an answer early, on any side. With --quick the
baselines answer 4 of the prompts, and their costs are multiplied by 8.

The last line is one JSON object:
    batch32_ratio: baseline / one batch of 32, prompts computed whole.
    shared_prefix_ratio: baseline / one batch of 32, the common beginning computed once.
    samples5_ratio: five calls of one answer each, by our own loop / one call of five answers.
    batch32_own_ratio, shared_prefix_own_ratio: the first two against our own loop.
    equal_answers: of all compared pairs of answers, how many are equal token by token.
    compared_answers: how many were compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Generator, Query, Sampling

PROMPTS, SHARED_TOKENS, NEW_TOKENS, SAMPLES = 32, 95, 16, 5
PARTS, QUICK_PROMPTS, QUICK_PARTS = 4, 4, 1
BEGINNING = (
    "You answer questions of visitors to the museum of the harbour. The museum has four floors. On the ground floor "
    "are the ships' models, the café and the shop. On the first floor are maps and instruments, on the second floor "
    "letters and diaries of sailors, and on the third floor a room with paintings and a view over the bay. The museum "
    "opens at nine and closes at six; on Mondays it is closed. Answer in one short sentence, be friendly, and say so "
    "if you do not know the answer. The question of the visitor follows. "
)
THINGS = ("compass", "logbook", "anchor", "chart", "lantern", "figurehead", "sextant", "rope")
QUESTIONS = (
    "On which floor do I find the {}, and may I take a photograph of it with my own small camera?",
    "My daughter would like to draw the {} today. Is there a table and a chair close to it?",
    "Who made the old {} that was shown in the newspaper last week, and how heavy is it really?",
    "Is the {} shown on Sundays too, and does a ticket for it cost more than the others do?",
)
GATES = {"batch32_ratio": 3.0, "shared_prefix_ratio": 6.0, "samples5_ratio": 2.0}
Answer = tuple[int, ...]
Result = TypeVar("Result")


def prompts_of(backbone: Backbone) -> list[Answer]:
    """Token ids of the prompts."""
    tokenizer = backbone.tokenizer
    beginning = tuple(tokenizer(BEGINNING * 3)["input_ids"][:SHARED_TOKENS])
    questions = [question.format(thing) for thing in THINGS for question in QUESTIONS]
    owns = [
        tokenizer(f" {question}", add_special_tokens=False)["input_ids"] for question in questions
    ]
    return [beginning + tuple(own) for own in owns[:PROMPTS]]


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds and what came of it."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def by_transformers(backbone: Backbone, prompts: Sequence[Answer]) -> list[Answer]:
    """The baseline: one prompt after the other by the library's own loop."""
    model: Any = backbone.model
    own, precision = model.config._attn_implementation, torch.get_float32_matmul_precision()
    model.set_attn_implementation("sdpa")
    torch.set_float32_matmul_precision("highest")
    found = []
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            found.append(tuple(whole[0, len(prompt) :].tolist()))
    finally:
        model.set_attn_implementation(own)
        torch.set_float32_matmul_precision(precision)
    return found


def greedy(generator: Generator, prompts: Sequence[Answer], *, share_prefix: bool) -> list[Answer]:
    """Ours, in one call."""
    queries = [Query(prompt, Sampling(NEW_TOKENS)) for prompt in prompts]
    answers = generator.generate(queries, share_prefix=share_prefix)
    return [answer.samples[0].token_ids for answer in answers]


def measure(
    backbone: Backbone, *, answered: int, parts: int
) -> tuple[dict[str, float], list[tuple[Answer, Answer]]]:
    """Costs of each side for all prompts, in CPU seconds, and pairs of answers that should be equal.

    Args:
        backbone: The model.
        answered: Prompts that the baselines answer.
        parts: Into which these are cut; the batches are measured once in each.
    """
    generator = Generator(backbone, stop_ids=frozenset())
    prompts = prompts_of(backbone)
    by_transformers(backbone, prompts[:1])
    greedy(generator, prompts[:2], share_prefix=True)
    names = ("transformers", "own", "batch", "shared")
    seconds: dict[str, list[float]] = {name: [] for name in (*names, "five calls", "one call")}
    pairs = []
    size = answered // parts
    for part in range(parts):
        chosen = slice(part * size, (part + 1) * size)
        some = prompts[chosen]
        costs, found = zip(
            timed(lambda some=some: by_transformers(backbone, some)),
            timed(lambda some=some: [greedy(generator, [p], share_prefix=False)[0] for p in some]),
            timed(lambda: greedy(generator, prompts, share_prefix=False)),
            timed(lambda: greedy(generator, prompts, share_prefix=True)),
            strict=True,
        )
        for name, cost in zip(names, costs, strict=True):
            seconds[name].append(cost)
        theirs, own, batch, shared = found
        pairs += [
            pair
            for other in (own, batch[chosen], shared[chosen])
            for pair in zip(theirs, other, strict=True)
        ]
        pairs += list(zip(batch, shared, strict=True))
        pairs += samples(generator, prompts[part], seconds)
    whole = PROMPTS / answered
    totals = {name: whole * sum(seconds[name]) for name in ("transformers", "own")}
    return totals | {
        name: statistics.median(seconds[name]) for name in seconds if name not in totals
    }, pairs


def samples(
    generator: Generator, prompt: Answer, seconds: dict[str, list[float]]
) -> list[tuple[Answer, Answer]]:
    """Five sampled answers by five calls and by one; adds the costs, gives pairs of answers."""
    sampling = Sampling(NEW_TOKENS, temperature=0.8, top_p=0.95, seeds=tuple(range(SAMPLES)))
    single = [Query(prompt, replace(sampling, seeds=(seed,))) for seed in sampling.seeds]
    cost, five = timed(lambda: [generator.generate([query])[0].samples[0] for query in single])
    seconds["five calls"].append(cost)
    cost, [one] = timed(lambda: generator.generate([Query(prompt, sampling)]))
    seconds["one call"].append(cost)
    return [(a.token_ids, b.token_ids) for a, b in zip(five, one.samples, strict=True)]


def figures_of(backbone: Backbone, *, answered: int, parts: int) -> dict[str, float]:
    """Everything that the last line holds; prints the costs.

    Args:
        backbone: The model.
        answered: As in :func:`measure`.
        parts: As in :func:`measure`.
    """
    costs, pairs = measure(backbone, answered=answered, parts=parts)
    print(f"{'':24}{'CPU s':>8}")
    for name, seconds in costs.items():
        print(f"  {name:22}{seconds:8.2f}")
    return {
        "batch32_ratio": costs["transformers"] / costs["batch"],
        "shared_prefix_ratio": costs["transformers"] / costs["shared"],
        "samples5_ratio": costs["five calls"] / costs["one call"],
        "batch32_own_ratio": costs["own"] / costs["batch"],
        "shared_prefix_own_ratio": costs["own"] / costs["shared"],
        "equal_answers": sum(a == b for a, b in pairs),
        "compared_answers": len(pairs),
    }


def report(figures: dict[str, float]) -> None:
    """Print each gate and whether it is met, and whether all answers are equal."""
    for name, bound in GATES.items():
        met = "met" if figures[name] >= bound else "not met"
        print(f"{name:<24}{figures[name]:>8.3g}  >= {bound:g}  {met}")
    equal = "met" if figures["equal_answers"] == figures["compared_answers"] else "not met"
    print(
        f"{'equal answers':<24}{figures['equal_answers']:>8} of {figures['compared_answers']}  {equal}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts for the baselines")
    quick = parser.parse_args().quick
    backbone = load(ModelRef(name="smollm2_135m"), dtype="float32", device="cpu")
    lengths = [len(prompt) for prompt in prompts_of(backbone)]
    print(
        f"{PROMPTS} prompts of {min(lengths)} to {max(lengths)} tokens, {SHARED_TOKENS} shared, {NEW_TOKENS} new ones"
    )
    print(f"{backbone.kernels.dtype}, 1 thread")
    answered, parts = (QUICK_PROMPTS, QUICK_PARTS) if quick else (PROMPTS, PARTS)
    figures = figures_of(backbone, answered=answered, parts=parts)
    report(figures)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
