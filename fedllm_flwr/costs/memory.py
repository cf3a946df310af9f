"""What training holds in memory, and sends, by method: numbers of values from the shapes of the matrices alone.

Activations are not in it: they depend on the batch and the implementation, and have to be measured.

Axes: a matrix has m rows and n columns, m <= n where a method projects its smaller side; r rank, t tokens of a prompt,
d width of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.costs.wire import FLOAT_BYTES
from fedllm_flwr.errors import ConfigError

Matrices = Sequence[tuple[int, int]]
"""Outputs and inputs of each trained matrix."""

MemoryMethod = Literal["full", "lora", "galore", "grass", "prompt"]
METHODS: tuple[MemoryMethod, ...] = ("full", "lora", "galore", "grass", "prompt")


@dataclass(frozen=True)
class MemoryRow:
    """Values that one method holds and sends for one model, under Adam.

    Attributes:
        model: Its name.
        method: full, lora, galore, grass or prompt.
        rank: r, or the tokens of a prompt; 0 for full training.
        weights: Of the matrices and of what is put beside them.
        optimizer: Both of Adam's moments.
        gradient: Held at a time if all gradients of a step are.
        projection: What says how a gradient is projected: GaLore's matrices, GRASS's indices and scales.
        wire: Sent one way for one update.
        float32_bytes: Of weights, moments, gradient and projection, 4 bytes each.
    """

    model: str
    method: str
    rank: int
    weights: int
    optimizer: int
    gradient: int
    projection: int
    wire: int
    float32_bytes: int


def memory_row(
    method: MemoryMethod, matrices: Matrices, *, model: str, rank: int, width: int = 1
) -> MemoryRow:
    """The row of a method.

    Args:
        method: Which.
        matrices: Those that are trained, or adapted.
        model: The model's name, for the table.
        rank: r, cut to the smaller side of a matrix; the tokens of a prompt; not read by full training.
        width: d, read by prompts.

    Raises:
        ConfigError: The method is unknown, the rank is below 1, or there is no matrix.

    Source:
        Muhamed et al. 2024 (GRASS), table 1, per matrix: full mn, 2mn, mn; LoRA mn + r(m+n), 2r(m+n), r(m+n); GaLore
        mn, 2rn, mn with mr for the projection; GRASS mn, 2rn, rn with 2r. What GaLore sends is its dense gradient.
    """
    if method not in METHODS:
        raise ConfigError(f"memory: expected one of {', '.join(METHODS)}, got {method!r}")
    if rank < 1 or not matrices:
        raise ConfigError(
            f"memory of {method}: expected a rank >= 1 and a matrix, got rank {rank} and {len(matrices)} matrices"
        )
    dense = sum(m * n for m, n in matrices)
    sides = [(min(rank, m, n), min(m, n), max(m, n)) for m, n in matrices]
    factors = sum(r * (m + n) for r, m, n in sides)
    rows = sum(r * n for r, _, n in sides)
    prompt = rank * width
    weights, optimizer, gradient, projection, wire = {
        "full": (dense, 2 * dense, dense, 0, dense),
        "lora": (dense + factors, 2 * factors, factors, 0, factors),
        "galore": (dense, 2 * rows, dense, sum(r * m for r, m, _ in sides), dense),
        "grass": (dense, 2 * rows, rows, 2 * sum(r for r, _, _ in sides), rows),
        "prompt": (dense + prompt, 2 * prompt, prompt, 0, prompt),
    }[method]
    total = FLOAT_BYTES * (weights + optimizer + gradient + projection)
    found = (weights, optimizer, gradient, projection, wire, total)
    return MemoryRow(model, method, 0 if method == "full" else rank, *found)


def memory_rows(
    matrices: Matrices,
    *,
    model: str,
    width: int,
    rank: int = 64,
    lora_rank: int = 8,
    tokens: int = 10,
) -> tuple[MemoryRow, ...]:
    """One row for each method.

    Args:
        matrices: As in :func:`memory_row`.
        model: The model's name.
        width: d.
        rank: Of GaLore and GRASS.
        lora_rank: Of LoRA.
        tokens: Of a prompt.
    """
    ranks = {"full": 1, "lora": lora_rank, "galore": rank, "grass": rank, "prompt": tokens}
    return tuple(
        memory_row(name, matrices, model=model, rank=ranks[name], width=width) for name in METHODS
    )


@dataclass(frozen=True)
class SparsityRow:
    """What keeping a share of the rows leaves of a model's training memory, at one choice of precisions.

    Attributes:
        model: Its name.
        precision: Of weights, gradients and moments.
        parameters: P.
        kept_percent: Rows that have a gradient and moments.
        total_bytes: P (weight + share (gradient + two moments)).
        total_gb: The same in 10⁹ bytes.
    """

    model: str
    precision: str
    parameters: int
    kept_percent: int
    total_bytes: int
    total_gb: float


PRECISIONS: tuple[tuple[str, int, int, int, int], ...] = (
    ("float32, all rows", 100, 8, 8, 8),
    ("float32", 10, 8, 8, 8),
    ("bfloat16", 10, 4, 4, 4),
    ("bfloat16, moments float32", 10, 4, 4, 8),
    ("weights int8, else bfloat16", 10, 2, 4, 4),
    ("weights int4, else bfloat16", 10, 1, 4, 4),
)
"""Name, percent of the rows, and half bytes of a weight, a gradient and a moment."""


def sparsity_rows(parameters: int = 7_000_000_000, model: str = "7B") -> tuple[SparsityRow, ...]:
    """How far sparse rows alone bring the memory of full training down, and what is the precision's doing.

    Args:
        parameters: P >= 1.
        model: The model's name, for the table.

    Raises:
        ConfigError: P is below 1.
    """
    if parameters < 1:
        raise ConfigError(f"memory: expected parameters >= 1, got {parameters}")
    rows = []
    for name, percent, weight, gradient, moment in PRECISIONS:
        half_bytes = 100 * weight + percent * (gradient + 2 * moment)
        total = parameters * half_bytes // 200
        rows.append(SparsityRow(model, name, parameters, percent, total, total / 1e9))
    return tuple(rows)
