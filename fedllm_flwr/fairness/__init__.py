"""Objectives over groups, and q-FFL over clients; numpy only.

`sums` is what is known of a group, `objectives` says what an objective is, `mixtures` and `penalties` are the two
families of them, `simplex` projects their multipliers, and `q_ffl` weighs clients instead of rows.
"""

from fedllm_flwr.fairness.mixtures import Agnostic, GroupDro
from fedllm_flwr.fairness.objectives import Multipliers, Objective, PlainMean
from fedllm_flwr.fairness.penalties import AccuracyGap, BoundedLoss
from fedllm_flwr.fairness.q_ffl import QFairMean
from fedllm_flwr.fairness.simplex import project_capped, project_simplex
from fedllm_flwr.fairness.sums import LEAST_ROWS, GroupSums, pool, present

OBJECTIVES: dict[str, type[Objective]] = {
    "mean": PlainMean,
    "group_dro": GroupDro,
    "agnostic": Agnostic,
    "bounded_loss": BoundedLoss,
    "accuracy_gap": AccuracyGap,
}
"""The closed table of objectives that weigh rows; q-FFL weighs clients and is `QFairMean`."""

__all__ = [
    "LEAST_ROWS",
    "OBJECTIVES",
    "AccuracyGap",
    "Agnostic",
    "BoundedLoss",
    "GroupDro",
    "GroupSums",
    "Multipliers",
    "Objective",
    "PlainMean",
    "QFairMean",
    "pool",
    "present",
    "project_capped",
    "project_simplex",
]
