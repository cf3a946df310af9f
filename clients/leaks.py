"""What a client's prompts give away of its rows, measured by the client, which alone knows the rows.

It says two numbers and neither rows nor states: how much of its states' energy varies with the rows at all, and how
well a linear attack on its prompts rebuilds what its reservoir has read.

Axes: n rows, m tokens of a prompt, d width of the model's embeddings, k bottleneck, T steps, n_in values of a step.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clients.contexts import Contexts
from clients.guard import guarded
from fedllm_flwr.privacy import reconstruction_r2, recovered_codes
from fedllm_flwr.reservoir import Controller, energy_share
from fedllm_flwr.settings.methods import FedResPromptConfig

SHADOW_ROWS, HELD_ROWS = 3, 2
"""Rows that the attack needs to be fitted on, and to be measured on."""


def leaks(
    method: FedResPromptConfig,
    contexts: Contexts,
    partition_id: int,
    controller: Controller,
    sent: Mapping[str, Tensor],
) -> dict[str, float]:
    """The client's two numbers.

    The attacker knows P, as the server does except under ``private_controller``, so it goes from prompts to codes
    b = P⁺p, and fits its decoder on the client's training rows, in place of rows that it would make up for itself: the
    reservoir is built from a seed that it knows. It is measured on held-out rows, as they were sent.

    Args:
        method: The settings.
        contexts: The reservoir's.
        partition_id: The client.
        controller: What made the prompts.
        sent: Prompts [n, m, d] of each held-out split, as they leave.

    Returns:
        ``energy-share`` of the training rows' states in [0, 1], and ``reconstruction-r2`` in [0, 1], the median over
        the values of a context (see :func:`readings`), 0 for no better than guessing the mean. Either is absent where
        there are too few rows, and the second where all held-out contexts are the same.
    """
    states = contexts.states(partition_id, "train")
    found = {"energy-share": energy_share(states)} if len(states) > 1 else {}
    held = sum(len(prompts) for prompts in sent.values())
    if len(states) < SHADOW_ROWS or held < HELD_ROWS:
        return found
    shadow = guarded(method, controller.prompts(states)[1])
    prompts = torch.cat([shadow, *sent.values()]).flatten(1).numpy()
    codes = recovered_codes(controller.lift.numpy(), prompts)
    wanted = readings(
        [s for split in ("train", *sent) for s in contexts.series(partition_id, split)]
    )
    r2 = reconstruction_r2(codes, wanted, np.arange(len(codes)) < len(states))
    if np.isfinite(r2).any():
        found["reconstruction-r2"] = max(0.0, float(np.nanmedian(r2)))
    return found


def readings(series: list[np.ndarray]) -> np.ndarray:
    """What an attacker wants of contexts: every value of each, or where their lengths differ the mean over the steps.

    Args:
        series: Of each row [T, n_in], T >= 1.

    Returns:
        float64 [n, T n_in] or [n, n_in].
    """
    if len({len(steps) for steps in series}) == 1:
        return np.stack([steps.ravel() for steps in series]).astype(np.float64)
    return np.stack([steps.mean(0, dtype=np.float64) for steps in series])
