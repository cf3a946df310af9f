"""Aggregation: what the mean of a cohort of LoRA adapters costs the server.

The adapter is rank 8 on the query and value projections of a 30-layer model of width 576: 120 tensors, 460,800
floats, from 64 clients. Named baseline: the usual way to write it. A reply carries a state dict; the server reads
every client's, then, tensor by tensor, stacks the cohort with `torch.stack` and takes its weighted mean. Ours: a
reply carries one flat array, which is read and added to a `RunningMean` (float64 sums, every value checked), then
dropped. Most of the ratio is the reading of 120 arrays; sums alone are also given.

CPU seconds of one thread, medians over interleaved repetitions; memory is the peak that Python and NumPy allocate.
The last line is one JSON object:
    stack_over_streaming: CPU time of the baseline over ours, from Flower's records as received to the mean.
    stack_over_streaming_arithmetic: the same over arrays that are already read: sums only.
    memory_growth_cohort_10_to_50: peak memory of our mean over 50 clients over that over 10 clients, each client's
        array made as it is added; 1 is flat.
"""

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedllm_flwr.averaging import Adapter, FactorMean, LoraFactors, ProductMean, RunningMean

RANK, SCALING, WIDTH, DEPTH, COHORT = 8, 2.0, 576, 30, 64
LAYERS = {f"{layer}.q_proj": WIDTH for layer in range(DEPTH)} | {
    f"{layer}.v_proj": 192 for layer in range(DEPTH)
}
FLOATS = sum(RANK * (WIDTH + out_features) for out_features in LAYERS.values())
WEIGHTS = [32.0 + client for client in range(COHORT)]
BASELINE, OURS = "records, stack + weighted mean (baseline)", "records, streaming, flat"
Candidates = dict[str, Callable[[], object]]


def adapter_of(flat: np.ndarray) -> Adapter:
    """View a flat array as factors, layer by layer, A before B."""
    adapter, start = {}, 0
    for layer, out_features in LAYERS.items():
        middle, end = start + RANK * WIDTH, start + RANK * (WIDTH + out_features)
        a = flat[start:middle].reshape(RANK, WIDTH)
        adapter[layer] = LoraFactors(a, flat[middle:end].reshape(out_features, RANK), SCALING)
        start = end
    return adapter


def state_dict_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The same factors as 120 tensors of their own memory."""
    tensors = {}
    for layer, factors in adapter.items():
        tensors[f"{layer}.lora_A"] = torch.from_numpy(factors.lora_a.copy())
        tensors[f"{layer}.lora_B"] = torch.from_numpy(factors.lora_b.copy())
    return tensors


def stack_and_mean(state_dicts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The baseline: the whole cohort of one tensor stacked, then its weighted mean."""
    weights = torch.tensor(WEIGHTS) / sum(WEIGHTS)
    return {
        name: (
            torch.stack([tensors[name] for tensors in state_dicts]) * weights[:, None, None]
        ).sum(0)
        for name in state_dicts[0]
    }


def stack_and_average(state_dicts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The baseline in NumPy: float64 inside, since its weights are."""
    return {
        name: np.average(
            np.stack([arrays[name] for arrays in state_dicts]), axis=0, weights=WEIGHTS
        )
        for name in state_dicts[0]
    }


def add_per_tensor(state_dicts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The loop that Flower's own strategies run, in the dtype that came in."""
    total = sum(WEIGHTS)
    sums: dict[str, np.ndarray] = {}
    for arrays, weight in zip(state_dicts, WEIGHTS, strict=True):
        for name, values in arrays.items():
            if name in sums:
                sums[name] += values * (weight / total)
            else:
                sums[name] = values * (weight / total)
    return sums


def streaming(flats: list[np.ndarray]) -> np.ndarray:
    """Ours: one flat array per client."""
    mean = RunningMean(FLOATS)
    for flat, weight in zip(flats, WEIGHTS, strict=True):
        mean.add(flat, weight)
    return mean.result()


def streaming_adapters(mean: FactorMean | ProductMean, adapters: list[Adapter]) -> object:
    """Ours for mixed ranks and alphas: layer by layer."""
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        mean.add(adapter, weight)
    return mean.result()


def read_stack_and_mean(records: list[ArrayRecord]) -> object:
    """The baseline, from replies of 120 arrays each."""
    return stack_and_mean([record.to_torch_state_dict() for record in records])


def read_streaming(records: list[ArrayRecord]) -> object:
    """Ours, from replies of one array each."""
    mean = RunningMean(FLOATS)
    for record, weight in zip(records, WEIGHTS, strict=True):
        mean.add(record["adapter"].numpy(), weight)
    return mean.result()


def candidates() -> Candidates:
    """Every way of taking the mean, over the same random cohort, checked to agree."""
    rng = np.random.default_rng(0)
    flats = [rng.standard_normal(FLOATS, dtype=np.float32) for _ in range(COHORT)]
    adapters = [adapter_of(flat) for flat in flats]
    tensors = [state_dict_of(adapter) for adapter in adapters]
    arrays = [{name: values.numpy() for name, values in client.items()} for client in tensors]
    usual = np.concatenate([mean.numpy().reshape(-1) for mean in stack_and_mean(tensors).values()])
    assert np.allclose(usual, streaming(flats), atol=1e-6)
    usual_replies = [ArrayRecord(client) for client in tensors]
    flat_replies = [ArrayRecord({"adapter": Array(flat)}) for flat in flats]
    return {
        BASELINE: lambda: read_stack_and_mean(usual_replies),
        OURS: lambda: read_streaming(flat_replies),
        "stack + weighted mean, torch": lambda: stack_and_mean(tensors),
        "stack + np.average, float64": lambda: stack_and_average(arrays),
        "add per tensor, as Flower does": lambda: add_per_tensor(arrays),
        "streaming, flat": lambda: streaming(flats),
        "streaming, FactorMean": lambda: streaming_adapters(
            FactorMean(rank=RANK, scaling=SCALING), adapters
        ),
        "streaming, ProductMean": lambda: streaming_adapters(ProductMean(), adapters),
    }


def cpu_medians(runs: Candidates, repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each candidate; every repetition runs all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def arriving(cohort: int) -> Iterator[np.ndarray]:
    """Clients' arrays, each made when it is asked for, as replies are decoded."""
    rng = np.random.default_rng(0)
    for _ in range(cohort):
        yield rng.standard_normal(FLOATS, dtype=np.float32)


def peak_bytes(mean_over: Callable[[Iterator[np.ndarray]], object], cohort: int) -> int:
    """Peak of what a mean over a cohort of this size allocates, with the arrays that it keeps alive."""
    tracemalloc.start()
    mean_over(arriving(cohort))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def streamed(arrays: Iterator[np.ndarray]) -> np.ndarray:
    """Our mean over arriving arrays."""
    mean = RunningMean(FLOATS)
    for flat in arrays:
        mean.add(flat, 1.0)
    return mean.result()


def factor_streamed(arrays: Iterator[np.ndarray]) -> object:
    """Our mean of factors over arriving arrays."""
    mean = FactorMean(rank=RANK, scaling=SCALING)
    for flat in arrays:
        mean.add(adapter_of(flat), 1.0)
    return mean.result()


def product_streamed(arrays: Iterator[np.ndarray]) -> object:
    """Our exact mean of products over arriving arrays: grows until each layer has turned dense."""
    mean = ProductMean()
    for flat in arrays:
        mean.add(adapter_of(flat), 1.0)
    return mean.result()


def stacked(arrays: Iterator[np.ndarray]) -> np.ndarray:
    """All arrays kept, then their mean."""
    return np.mean(np.stack(list(arrays)), axis=0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 repetitions instead of 15")
    repetitions = 3 if parser.parse_args().quick else 15
    torch.set_num_threads(1)

    medians = cpu_medians(candidates(), repetitions)
    baseline = medians[BASELINE]
    print(f"Mean of {COHORT} adapters, {FLOATS:,} floats in {2 * len(LAYERS)} tensors")
    print(f"{'':42}{'CPU ms':>8}{'baseline / this':>18}")
    for name, seconds in medians.items():
        print(f"{name:42}{seconds * 1e3:8.1f}{baseline / seconds:18.2f}")

    print(f"\n{'Peak memory, MB':42}{'10 clients':>12}{'50 clients':>12}{'growth':>8}")
    growth = {}
    for name, mean_over in {
        "all kept, then stacked": stacked,
        "streaming, flat": streamed,
        "streaming, FactorMean": factor_streamed,
        "streaming, ProductMean": product_streamed,
    }.items():
        few, many = peak_bytes(mean_over, 10), peak_bytes(mean_over, 50)
        growth[name] = many / few
        print(f"{name:42}{few / 1e6:12.1f}{many / 1e6:12.1f}{growth[name]:8.2f}")

    figures = {
        "stack_over_streaming": round(baseline / medians[OURS], 3),
        "stack_over_streaming_arithmetic": round(
            medians["stack + weighted mean, torch"] / medians["streaming, flat"], 3
        ),
        "memory_growth_cohort_10_to_50": round(growth["streaming, flat"], 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
