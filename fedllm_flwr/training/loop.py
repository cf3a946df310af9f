"""The local training loop: one client, or several in step with each other over one shared backbone.

A client's loss is the mean cross-entropy over the label tokens of its step, each row's counted with the row's
weight. The losses of the clients of a pass are summed before the backward pass; since no two clients share a
trained value, the gradient of the sum with respect to one client's adapter is that client's own.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import (
    Batch,
    Share,
    collate,
    label_tokens,
    plan_steps,
    split_passes,
)
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import AdapterStack
from fedllm_flwr.unlearning.signs import project_

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch's optimizers have a kernel that reads and writes each value once."""


class Trainee:
    """One client while it trains: its plan, its optimizer and its sums.

    Args:
        index: Its place in the adapter stack.
        rows: Its rows, each with at least one target.
        parameters: What is trained, with its start values loaded.
        settings: How to train.
        seed: Address of its row order and dropout masks.
        row_weights: Weight of each row's loss, [n]; None = 1.
        signs: Of each parameter the signs that its values keep to, in its shape; none = they are free.

    Attributes:
        rows: Its rows.
        losses: Loss of each step done, before its update.
        tokens: Input tokens read, padding not counted.
        error: Why it stopped early, or empty.
    """

    def __init__(
        self,
        index: int,
        rows: Sequence[Encoded],
        parameters: list[nn.Parameter],
        *,
        settings: LocalSettings,
        seed: int,
        row_weights: np.ndarray | None = None,
        signs: Sequence[Tensor] = (),
    ) -> None:
        self.index = index
        self.losses: list[float] = []
        self.tokens = 0
        self.error = ""
        self.rows = rows
        self._parameters = parameters
        self._settings = settings
        self._seed = seed
        self._row_weights = row_weights
        self._plan = plan_steps(len(rows), settings, seed)
        self._signs = signs
        remembers = settings.proximal_mu or signs
        self._start = [p.detach().clone() for p in parameters] if remembers else []
        self._optimizer = make_optimizer(parameters, settings)
        self._optimizer.zero_grad()
        self._step_loss = 0.0

    def next_step(self) -> list[Share]:
        """The micro-batches of the next step; empty at the end.

        Every label token weighs its row's weight / (label tokens of the step), so the gradients of the
        micro-batches add up to that of the step's mean loss.
        """
        planned = next(self._plan, [])
        micro_batches = [[self.rows[i] for i in indices] for indices in planned]
        weight = 1.0 / max(1, sum(label_tokens(rows) for rows in micro_batches))
        self._step_loss = 0.0
        return [
            Share(rows, weight, None if self._row_weights is None else self._row_weights[indices])
            for rows, indices in zip(micro_batches, planned, strict=True)
        ]

    def dropout_seed(self, micro_batch: int) -> int:
        """Seed of the dropout masks of a micro-batch of the current step."""
        return derive_seed(self._seed, "dropout", len(self.losses), micro_batch)

    def add(self, share: Share, loss: float) -> None:
        """Count a micro-batch whose backward pass is done."""
        self._step_loss += loss
        self.tokens += share.tokens

    def update(self) -> bool:
        """Finish the step; False if its loss is not finite, and then nothing is updated."""
        if not math.isfinite(self._step_loss):
            self.error = f"loss is {self._step_loss} at step {len(self.losses) + 1}"
            return False
        self.losses.append(self._step_loss)
        with torch.no_grad():
            for parameter, start in zip(self._parameters, self._start, strict=False):
                if not self._settings.proximal_mu:
                    break
                assert parameter.grad is not None  # noqa: S101  # every layer is in the graph
                parameter.grad.add_(parameter - start, alpha=self._settings.proximal_mu)
        if self._settings.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_norm)
        self._optimizer.step()
        for parameter, start, signs in zip(
            self._parameters, self._start, self._signs, strict=False
        ):
            project_(parameter, start, signs)
        self._optimizer.zero_grad()
        return True


def make_optimizer(
    parameters: list[nn.Parameter], settings: LocalSettings
) -> torch.optim.Optimizer:
    """The optimizer of one client.

    Args:
        parameters: What it updates.
        settings: Which one, and its constants. Weight decay is decoupled in ``adamw`` and an L2
            penalty in ``sgd``.
    """
    fused = parameters[0].device.type in FUSED_DEVICES
    rate, decay, up = settings.learning_rate, settings.weight_decay, settings.ascend
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            rate,
            momentum=settings.momentum,
            weight_decay=decay,
            fused=fused,
            maximize=up,
        )
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        parameters, rate, betas=betas, weight_decay=decay, fused=fused, maximize=up
    )


def run(
    backbone: Backbone,
    stack: AdapterStack,
    trainees: Sequence[Trainee],
    head_token_ids: tuple[int, ...] | None,
    extra: int = 0,
) -> None:
    """Train until every client has done its steps; those that finish or fail leave the stack.

    Args:
        backbone: The shared model.
        stack: The clients' adapters.
        trainees: The clients.
        head_token_ids: As in :meth:`fedllm_flwr.models.backbone.Backbone.row_losses`.
        extra: As in :func:`fedllm_flwr.training.batches.split_passes`.
    """
    with stack.active():
        running = list(trainees)
        while running:
            steps = [(trainee, trainee.next_step()) for trainee in running]
            steps = [(trainee, step) for trainee, step in steps if step]
            for micro_batch in range(max((len(step) for _, step in steps), default=0)):
                at_work = [(t, step[micro_batch]) for t, step in steps if len(step) > micro_batch]
                for members in split_passes([share for _, share in at_work], extra):
                    chosen = [at_work[i] for i in members]
                    seeds = [trainee.dropout_seed(micro_batch) for trainee, _ in chosen]
                    stack.bind([trainee.index for trainee, _ in chosen], seeds)
                    losses = _pass(backbone, stack, [share for _, share in chosen], head_token_ids)
                    for (trainee, share), loss in zip(chosen, losses, strict=True):
                        trainee.add(share, loss)
            running = [trainee for trainee, _ in steps if trainee.update()]


def forward_backward(
    backbone: Backbone, stack: AdapterStack, batch: Batch, head_token_ids: tuple[int, ...] | None
) -> Tensor:
    """One pass of the bound clients; their parameters get the gradient of the sum of weighted losses.

    Args:
        backbone: The shared model.
        stack: The adapters, bound in the order of the batch.
        batch: Rows, targets and weights.
        head_token_ids: As in :meth:`fedllm_flwr.models.backbone.Backbone.row_losses`.

    Returns:
        Weighted cross-entropy of each label token [n], in nats.
    """
    hidden = stack.hidden(batch.input_ids, batch.lengths)
    states = hidden.detach().requires_grad_()
    chosen = states.flatten(0, 1).index_select(0, batch.positions)
    weighted = backbone.row_losses(chosen, batch.targets, head_token_ids) * batch.weights
    weighted.sum().backward()
    assert states.grad is not None  # noqa: S101  # every batch has targets
    stack.backward(hidden, states.grad)
    return weighted.detach()


def _pass(
    backbone: Backbone,
    stack: AdapterStack,
    shares: Sequence[Share],
    head_token_ids: tuple[int, ...] | None,
) -> list[float]:
    """Forward and backward; each share's weighted loss."""
    batch = collate(shares, backbone.device)
    weighted = forward_backward(backbone, stack, batch, head_token_ids)
    sums = np.zeros(len(shares))
    np.add.at(sums, batch.owners.cpu().numpy(), weighted.cpu().numpy())
    return [float(value) for value in sums]
