"""Canaries: secrets drawn at random and put among the rows of one client, so that what a model remembers is measurable.

A canary asks for the code of a locker and its answer is six random digits. No other row says anything about it, so a
model that answers it has remembered that client. Codes that were drawn in the same way and put nowhere are its
non-members, and other codes for the same locker are the candidates that it is ranked among.

Source:
    Carlini, Liu, Erlingsson, Kos, Song 2019, The secret sharer, section 4.
"""

from dataclasses import replace

import numpy as np

from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.base import Canaries, Row, TaskOptions

DIGITS = 6
QUESTION = "What is the code of locker {name}?"
LETTERS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")
NAME_LETTERS = 4


def planted(options: TaskOptions, seed: int) -> Canaries | None:
    """The canaries that a task's options ask for; None where they ask for none.

    Args:
        options: ``canaries``, ``canary_client`` and ``canary_copies`` are read.
        seed: The experiment's seed.
    """
    if not options.canaries:
        return None
    rows = _draw(options.canaries, numpy_generator(seed, "canaries"), "canary")
    return Canaries(rows, options.canary_client, options.canary_copies)


def held_out(count: int, seed: int) -> tuple[Row, ...]:
    """Secrets like the canaries that are in nobody's rows.

    Args:
        count: How many.
        seed: The experiment's seed.
    """
    return _draw(count, numpy_generator(seed, "held-out canaries"), "held-out-canary")


def copies(canaries: Canaries) -> tuple[Row, ...]:
    """The rows that are put among a client's own: each canary so many times, under different row ids."""
    return tuple(
        replace(row, row_id=f"{row.row_id}-{number}")
        for row in canaries.rows
        for number in range(canaries.copies)
    )


def candidates(canary: Row, count: int, seed: int) -> tuple[str, ...]:
    """Codes that the canary's might have been, all different and none its own.

    Args:
        canary: A planted one.
        count: How many, below 10 ** ``DIGITS``; 10,000 resolve 13 bits of exposure.
        seed: The experiment's seed.
    """
    random = numpy_generator(seed, "canary candidates", canary.row_id)
    codes = random.choice(10**DIGITS - 1, count, replace=False)
    own = int(canary.target)  # the codes from its own on move up by one
    return tuple(f"{code + (code >= own):0{DIGITS}d}" for code in codes)


def _draw(count: int, random: np.random.Generator, name: str) -> tuple[Row, ...]:
    rows = []
    for number in range(count):
        locker = "".join(random.choice(LETTERS, NAME_LETTERS))
        code = f"{random.integers(10**DIGITS):0{DIGITS}d}"
        rows.append(Row(f"{name}-{number}", QUESTION.format(name=locker), code))
    return tuple(rows)
