"""Cross-entropy under a frozen output embedding, computed in chunks that keep no logits.

Logits of n positions cost n x V x 4 bytes, several times over with autograd; with a vocabulary of 50,000
they dominate the memory of a training step. The head is frozen, so the only gradient that is needed is that
of the hidden states, and it can be formed with the loss, chunk by chunk.

Axes: n chosen positions, d hidden size, V rows of the head (the vocabulary, or only the label tokens).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 * 2**20
"""Float32 logits held at a time. Small enough for the allocator to reuse the block instead of mapping fresh pages."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the product of hidden state and head before the softmax.

    z = scale * (h W^T + bias), then softcap * tanh(z / softcap) if softcap > 0.

    Attributes:
        scale: Factor on the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        softcap: Bound of the logits (Gemma 2); 0 means unbounded.
    """

    scale: float = 1.0
    softcap: float = 0.0


IDENTITY = LogitTransform()


def frozen_head_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Cross-entropy of each row.

    Args:
        hidden: Final hidden states [n, d]; the only argument that gets a gradient.
        head: Frozen output embedding [V, d], in the dtype of hidden.
        targets: Row of the head that is right, [n], integers.
        bias: Bias [V] of the head.
        transform: What the model does to its logits.

    Returns:
        Losses [n] in nats; float32, or float64 for float64 input. Softmax and sum run in that dtype.
    """
    return _FrozenHeadLosses.apply(hidden, head, targets, bias, transform)


@torch.no_grad()
def frozen_head_scores(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """Loss and prediction of each row, without gradient.

    Args:
        hidden: As in :func:`frozen_head_losses`.
        head: As in :func:`frozen_head_losses`.
        targets: As in :func:`frozen_head_losses`.
        bias: As in :func:`frozen_head_losses`.
        transform: As in :func:`frozen_head_losses`.

    Returns:
        Losses [n] in nats, and the head row with the highest logit [n].
    """
    losses, best = [], []
    for rows in _chunks(hidden, head):
        logits = _logits(hidden[rows], head, bias, transform)
        losses.append(logits.logsumexp(1) - _pick(logits, targets[rows]))
        best.append(logits.argmax(1))
    if not losses:
        return hidden.new_zeros(0, dtype=torch.float32), targets.new_zeros(0)
    return torch.cat(losses), torch.cat(best)


class _FrozenHeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=_sum_dtype(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for rows in _chunks(hidden, head):
            logits = _logits(hidden[rows], head, bias, transform)
            right = _pick(logits, targets[rows])
            if gradient is None:
                losses[rows] = logits.logsumexp(1) - right
                continue
            normaliser, slope = _slope(logits, targets[rows], transform)
            losses[rows] = normaliser - right
            torch.mm(slope.to(head.dtype), head, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None, None


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(hidden: Tensor, head: Tensor) -> list[slice]:
    rows = max(1, CHUNK_BYTES // (4 * len(head)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = (hidden @ head.t()).to(_sum_dtype(hidden))
    if bias is not None:
        logits += bias
    if transform.scale != 1.0:
        logits *= transform.scale
    if transform.softcap:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1)


def _slope(logits: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """The logarithm of the softmax's denominator [n], and the gradient of the loss by h W^T, which overwrites logits.

    The gradient is softmax minus one-hot, through the transform; both come of one exponential.
    """
    bend = 1 - (logits / transform.softcap) ** 2 if transform.softcap else None
    highest = logits.amax(1, keepdim=True)
    slope = logits.sub_(highest).exp_()
    total = slope.sum(1, keepdim=True)
    slope.div_(total)
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1
    if bend is not None:
        slope *= bend
    if transform.scale != 1.0:
        slope *= transform.scale
    return (total.log_() + highest).squeeze(1), slope
