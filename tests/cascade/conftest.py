"""Tiers whose members err as told, and records of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.cascade import Answer, Price, TierOutcomes, tier_outcomes


@pytest.fixture
def make_tier() -> Callable[..., TierOutcomes]:
    """A tier from the members' labels: one list for each query; ``right`` is the right label of each."""

    def made(
        labels: Sequence[Sequence[str | None]],
        right: Sequence[str],
        tier: str = "small",
        tokens: int = 10,
        price: Price | None = None,
    ) -> TierOutcomes:
        answers = [
            [
                Answer(f"q{q}", tier, f"m{m}", label, label == truth, tokens, 1)
                for m, label in enumerate(row)
            ]
            for q, (row, truth) in enumerate(zip(labels, right, strict=True))
        ]
        return tier_outcomes(answers, price or Price())

    return made


@pytest.fixture
def draw_labels() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Labels of a simulated ensemble, [Q, k], and the right ones, [Q]; queries differ in difficulty.

    With ``shared`` every member gives the first member's answer: clones.
    """

    def drawn(
        queries: int, members: int, seed: int, shared: bool = False, classes: int = 4
    ) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        ease = rng.uniform(0.2, 1.0, (queries, 1))
        truth = rng.integers(0, classes, queries)
        known = rng.random((queries, members)) < ease
        wrong = (truth[:, None] + rng.integers(1, classes, (queries, members))) % classes
        labels = np.where(known, truth[:, None], wrong)
        if shared:
            labels = np.repeat(labels[:, :1], members, axis=1)
        return labels.astype(str), truth.astype(str)

    return drawn


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """One record of a file."""

    def made(
        query: str, tier: str | int, member: str, answer: Any, correct: bool, **more: Any
    ) -> dict:
        tokens = {"input_tokens": 10, "output_tokens": 1}
        return {"query": query, "tier": tier, "member": member, "answer": answer, "correct": correct,
                **tokens, **more}  # fmt: skip

    return made
