"""How likely a model finds given ways to go on from a prompt, which is computed once for all of them.

Axes: c continuations, t tokens of one.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation import BATCH_POSITIONS, Generator, Query, Sampling
from fedllm_flwr.models.generation_batch import CachedRows
from fedllm_flwr.models.generation_start import KeysAndValues


@torch.no_grad()
def continuation_losses(
    generator: Generator, prompt_ids: tuple[int, ...], continuations: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Losses of the tokens of each continuation.

    Args:
        generator: The model, with what a run has added to it.
        prompt_ids: The whole prompt, without soft tokens.
        continuations: Token ids of each, at least one. [c]

    Returns:
        Of each, the cross-entropies of its tokens over the whole vocabulary in nats, float64 [t].

    Raises:
        ConfigError: A continuation has no token, or it and the prompt cannot be computed, see
            :meth:`fedllm_flwr.models.generation.Generator.check`.
    """
    if not all(continuations):
        raise ConfigError("continuations: expected at least one token in each, got none")
    if not continuations:
        return []
    longest = max(map(len, continuations))
    generator.check(Query(prompt_ids, Sampling(longest)))
    own = prompt_ids[len(generator.leading_ids) :]
    losses: list[np.ndarray] = [np.zeros(0)] * len(continuations)
    by_length = sorted(range(len(continuations)), key=lambda i: len(continuations[i]))
    with generator.computing() as start:
        columns = len(prompt_ids) + longest + (start[0][0].shape[2] if start else 0)
        size = max(1, BATCH_POSITIONS // columns)
        for first in range(0, len(by_length), size):
            members = by_length[first : first + size]
            chosen = [continuations[i] for i in members]
            found = _losses(generator.backbone, start, own, chosen)
            for i, each in zip(members, found, strict=True):
                losses[i] = each
    return losses


def _losses(
    backbone: Backbone,
    start: KeysAndValues,
    prompt: tuple[int, ...],
    continuations: Sequence[tuple[int, ...]],
) -> Iterator[np.ndarray]:
    """Losses of one batch. Padding is behind a row's own tokens, which never look at it."""
    state = CachedRows(backbone, start)
    if len(prompt) > 1:
        state.read(torch.tensor([prompt[:-1]]))
    state.repeat(len(continuations))
    ids = torch.zeros(len(continuations), max(map(len, continuations)), dtype=torch.long)
    for k, tokens in enumerate(continuations):
        ids[k, : len(tokens)] = torch.tensor([prompt[-1], *tokens[:-1]])
    states = state.forward(ids, torch.ones_like(ids))
    for tokens, row in zip(continuations, states, strict=True):
        targets = torch.tensor(tokens, device=backbone.device)
        found, _ = backbone.row_scores(row[: len(tokens)].contiguous(), targets)
        yield found.double().cpu().numpy()
