"""Bytes of training and of one client's update by formula, from the shapes of the matrices alone.

Axes: m outputs and n inputs of each matrix, r rank, d width of the embeddings, l soft tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm_flwr.costs import grass_matrices, lora_parameters, prompt_bytes

FLOAT_BYTES, INDEX_BYTES = 4, 8
Matrices = Sequence[tuple[int, int]]
"""Outputs and inputs of each matrix."""


@dataclass(frozen=True)
class Predicted:
    """Bytes of float32 training under Adam.

    Attributes:
        state: Held between steps, beside weights: two moments of what is trained, and projections.
        held: Those and the gradients that are held at a time; neither activations nor a step's own copies.
        sent: Of one client's update.
    """

    state: int
    held: int
    sent: int


def dense(matrices: Matrices, *, layered: bool) -> Predicted:
    """AdamW on whole matrices; layer by layer only the largest gradient is held, else all of them are."""
    sizes = [m * n for m, n in matrices]
    gradient = max(sizes) if layered else sum(sizes)
    return _floats(2 * sum(sizes), gradient, sum(sizes))


def grass(matrices: Matrices, rank: int) -> Predicted:
    """GRASS on rows of outputs: moments and one gradient of r x n, and int64 places of the rows."""
    rows = [r * n for r, n in grass_matrices([(n, m) for m, n in matrices], rank)]
    found = _floats(2 * sum(rows), max(rows), sum(rows))
    places = INDEX_BYTES * sum(min(rank, m) for m, _ in matrices)
    return Predicted(found.state + places, found.held + places, found.sent)


def galore(matrices: Matrices, rank: int) -> Predicted:
    """GaLore on the smaller side: moments of r x max, a projection of min x r; whole matrices are sent."""
    longer, shorter = ([f(m, n) for m, n in matrices] for f in (max, min))
    sizes = [m * n for m, n in matrices]
    state = rank * (2 * sum(longer) + sum(shorter))
    return _floats(state, rank * max(longer), sum(sizes))


def lora(matrices: Matrices, rank: int) -> Predicted:
    """Both factors of every matrix, and the gradient of all of them."""
    own = lora_parameters([(n, m) for m, n in matrices], rank)
    return _floats(2 * own, own, own)


def prompt(length: int, width: int) -> Predicted:
    """A soft prompt."""
    own = prompt_bytes(length, width)
    return Predicted(2 * own, 3 * own, own)


def _floats(state: int, gradient: int, sent: int) -> Predicted:
    return Predicted(FLOAT_BYTES * state, FLOAT_BYTES * (state + gradient), FLOAT_BYTES * sent)
