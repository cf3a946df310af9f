"""The rows that the clients of a benchmark train on: random tokens, the same for every client program."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

VOCABULARY = 49152
"""Of SmolLM2."""
RANK, ALPHA, TARGET_MODULES = 8, 16.0, ("q_proj", "v_proj")
LEARNING_RATE, CLIP_NORM = 1e-3, 1.0
ALL_LABELS = -1
READY = "ready"


@dataclass(frozen=True)
class Shape:
    """Work of one message.

    Attributes:
        rows: Rows in total.
        batch: Rows of a step.
        length: Input tokens of a row.
        answer: Tokens at the end of a row that are targets, or ``ALL_LABELS``: all but the first.
    """

    rows: int
    batch: int
    length: int
    answer: int = ALL_LABELS

    @property
    def targets(self) -> int:
        """Targets of a row."""
        return self.length - 1 if self.answer == ALL_LABELS else self.answer

    def tokens(self, client: int = 0) -> np.ndarray:
        """Token ids [rows, length] of a client, int64."""
        return np.random.default_rng((7, client)).integers(0, VOCABULARY, (self.rows, self.length))


WORKER_SHAPE = Shape(rows=16, batch=4, length=64)


def serve_as_worker(message: Callable[[], object]) -> None:
    """Train one message, say so, and live until stdin closes."""
    message()
    print(READY, flush=True)
    sys.stdin.read()
