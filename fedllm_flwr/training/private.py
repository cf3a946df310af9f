"""Training with sample-level differential privacy: steps from clipped gradients of single rows, and noise.

Clients that share a pass each get their own gradient. Here the places of a stack hold copies of one client's adapter,
each serves one row, and so each gets the gradient of that row alone, at the cost of a plain pass.

What it protects: whether any one row was among a client's rows, from whoever sees the adapters. Not protected are the
number of rows, which rates and divisors are built on, and what is told beside the adapter: losses, tokens, time, and
that training failed. Rounding is not covered either: noise has last bits that can be attacked (Mironov 2012), and a
row's gradient differs in its last bits with the rows that share its pass; with ``cohort_tokens=0`` no row shares one.

Axes: n rows of a client, k rows of a pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, by_length, collate
from fedllm_flwr.training.loop import forward_backward, make_optimizer
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy
from fedllm_flwr.training.stacks import AdapterStack


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """What an accountant needs to know of a client's steps; see :func:`fedllm_flwr.privacy.sum_epsilon`.

    Attributes:
        sampling_rate: Probability q with which each row took part in a step, by itself, in (0, 1].
        steps: Noised sums that the adapter was built from.
        noise_multiplier: Standard deviation of a sum's noise over the largest norm of a row's contribution.
    """

    sampling_rate: float
    steps: int
    noise_multiplier: float


@dataclass(frozen=True, slots=True, eq=False)
class PrivatePlan:
    """Which rows take part in which step, drawn before training.

    Attributes:
        releases: What all steps together amount to.
        expected_rows: Rows of a step on average, q · n: what its sum is divided by.
        steps: Per step its passes, each the indices [k] of its rows; a step may have none.
    """

    releases: Releases
    expected_rows: int
    steps: Sequence[Sequence[np.ndarray]]

    @property
    def slots(self) -> int:
        """Copies of the adapter that the largest pass needs, at least 1."""
        return max((len(rows) for passes in self.steps for rows in passes), default=1)


def plan_private(
    rows: Sequence[Encoded],
    settings: LocalSettings,
    random: np.random.Generator,
    *,
    extra: int = 0,
    alone: bool = False,
) -> PrivatePlan:
    """Draw the rows of each step by independent coins of probability q = min(1, rows of a step / n).

    There are ``local_steps`` steps, or else ``local_epochs`` times those of a plain epoch. A pass holds rows of
    similar length, at most ``cohort_tokens`` padded positions of them, or a single row.

    Args:
        rows: The client's rows, at least one, each with targets.
        settings: How to train, with ``sample_privacy``.
        random: Draws the rows. Whoever sees the adapter must not be able to build it, since ε counts on not knowing
            who took part.
        extra: As in :func:`fedllm_flwr.training.batches.split_passes`.
        alone: Whether every row needs a pass of its own.

    Raises:
        ConfigError: The settings have no ``sample_privacy``.

    Source:
        Abadi et al. 2016 (DP-SGD), Algorithm 1, whose lots have q = L / N.
    """
    privacy = _privacy(settings)
    expected = min(len(rows), settings.rows_per_step)
    rate = expected / len(rows)
    per_epoch = math.ceil(len(rows) / settings.rows_per_step)
    count = settings.local_steps or settings.local_epochs * per_epoch
    budget = 0 if alone else settings.cohort_tokens
    steps = []
    for _ in range(count):
        drawn = np.flatnonzero(random.random(len(rows)) < rate)
        passes = by_length([rows[int(index)] for index in drawn], budget, extra)
        steps.append([drawn[members] for members in passes])
    releases = Releases(sampling_rate=rate, steps=count, noise_multiplier=privacy.noise_multiplier)
    return PrivatePlan(releases, expected, steps)


def add_clipped(totals: Sequence[Tensor], gradient: Sequence[Tensor], clip_norm: float) -> float:
    """Scale one row's gradient down to a largest norm and add it to running sums.

    Args:
        totals: Changed in place.
        gradient: In the shapes of the sums; its norm is that of all tensors together.
        clip_norm: C, > 0, may be infinite.

    Returns:
        The gradient's norm before; if that is not finite, nothing is added.
    """
    # float32 sums of squares miss the norm of a million values by 1e-4, and not every device has wider ones
    parts = [torch.linalg.vector_norm(part.cpu(), dtype=torch.float64) for part in gradient]
    norm = float(torch.stack(parts).norm())
    if math.isfinite(norm):
        factor = 1.0 if norm <= clip_norm else clip_norm / norm
        for total, part in zip(totals, gradient, strict=True):
            total.add_(part, alpha=factor)
    return norm


class PrivateTrainee:
    """One client while it trains with noise: its copies, its optimizer and its sums.

    Args:
        rows: Its rows.
        slots: Per copy of the adapter what is trained, with its start values loaded. Copy 0 is stepped, the others
            follow it.
        plan: Which rows take part when.
        settings: How to train, with ``sample_privacy``.
        random: Draws the noise, and seeds of dropout masks: one that could be known would tie a row's mask to
            which other rows took part.

    Attributes:
        rows: Its rows.
        losses: Mean loss of the rows of each step done, before its update; not a number for a step without rows.
        tokens: Input tokens read, padding not counted.
        error: Why it stopped early, or empty.

    Raises:
        ConfigError: The settings have no ``sample_privacy``.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        slots: Sequence[list[nn.Parameter]],
        plan: PrivatePlan,
        *,
        settings: LocalSettings,
        random: np.random.Generator,
    ) -> None:
        self.rows = rows
        self.losses: list[float] = []
        self.tokens = 0
        self.error = ""
        self._slots = slots
        self._plan = plan
        self._privacy = _privacy(settings)
        self._proximal_mu = settings.proximal_mu
        self._random = random
        self._start = [p.detach().clone() for p in slots[0]] if settings.proximal_mu else []
        self._optimizer = make_optimizer(slots[0], settings)
        self._totals = [torch.zeros_like(p) for p in slots[0]]
        self._losses_of_step: list[float] = []
        self._drop_gradients()

    def dropout_seeds(self, count: int) -> list[int]:
        """Seeds of the masks of the rows of a pass."""
        return [int(seed) for seed in self._random.integers(2**63, size=count)]

    def add(self, rows: Sequence[Encoded], losses: np.ndarray) -> None:
        """Count a pass whose backward pass is done: row i of it has left its gradient at copy i.

        Args:
            rows: Of the pass.
            losses: Of each row [k].
        """
        step = len(self.losses) + 1
        self.tokens += sum(len(row.input_ids) for row in rows)
        self._losses_of_step.extend(float(loss) for loss in losses)
        for parameters, loss in zip(self._slots[: len(rows)], losses, strict=True):
            gradient = [p.grad for p in parameters if p.grad is not None]
            norm = add_clipped(self._totals, gradient, self._privacy.clip_norm)
            if not math.isfinite(loss):
                self.error = f"loss is {loss} at step {step}"
            elif not math.isfinite(norm):
                self.error = f"norm of a row's gradient is {norm} at step {step}"
        self._drop_gradients()

    def update(self) -> bool:
        """Finish the step, which may have no rows; False if a row is not finite, and then nothing is updated."""
        if self.error:
            return False
        found = self._losses_of_step
        self.losses.append(sum(found) / len(found) if found else math.nan)
        self._losses_of_step = []
        with torch.no_grad():
            for parameter, total in zip(self._slots[0], self._totals, strict=True):
                parameter.grad = self._noised(total).div_(self._plan.expected_rows)
                total.zero_()
            for parameter, start in zip(self._slots[0], self._start, strict=False):
                assert parameter.grad is not None  # noqa: S101  # set above
                parameter.grad.add_(parameter - start, alpha=self._proximal_mu)
            self._optimizer.step()
            for copy in self._slots[1:]:
                for parameter, stepped in zip(copy, self._slots[0], strict=True):
                    parameter.copy_(stepped)
        self._drop_gradients()
        return True

    def _noised(self, total: Tensor) -> Tensor:
        """A copy of a sum, with noise."""
        if not self._privacy.noise_multiplier:
            return total.clone()
        deviation = self._privacy.noise_multiplier * self._privacy.clip_norm
        noise = torch.from_numpy(deviation * self._random.standard_normal(tuple(total.shape)))
        return total + noise.to(total.dtype).to(total.device)

    def _drop_gradients(self) -> None:
        for parameters in self._slots:
            for parameter in parameters:
                parameter.grad = None


def run_private(
    backbone: Backbone,
    stack: AdapterStack,
    trainee: PrivateTrainee,
    plan: PrivatePlan,
    head_token_ids: tuple[int, ...] | None,
) -> None:
    """Train one client until its plan is done, or until a row is not finite.

    A row's loss is the mean over its own label tokens, so that no row's gradient depends on another row. A step's
    gradient is 1/(q n) · (Σ clipped gradients + noise), then comes FedProx's term, then the optimizer's step: all
    but the sum is done to what is already noised, and costs no privacy.

    Args:
        backbone: The shared model.
        stack: As many copies of the client's adapter as the plan has slots.
        trainee: The client.
        plan: Which rows take part when.
        head_token_ids: As in :meth:`fedllm_flwr.models.backbone.Backbone.row_losses`.

    Source:
        Abadi et al. 2016 (DP-SGD), Algorithm 1. Departures: the optimizer may be AdamW; rows without label tokens
        are not counted in N.
    """
    with stack.active():
        for passes in plan.steps:
            for members in passes:
                rows = [trainee.rows[index] for index in members]
                stack.bind(range(len(rows)), trainee.dropout_seeds(len(rows)))
                shares = [Share([row], token_weight=1.0 / len(row.targets)) for row in rows]
                batch = collate(shares, backbone.device)
                weighted = forward_backward(backbone, stack, batch, head_token_ids)
                losses = np.zeros(len(rows))
                np.add.at(losses, batch.owners.cpu().numpy(), weighted.cpu().numpy())
                trainee.add(rows, losses)
            if not trainee.update():
                break


def _privacy(settings: LocalSettings) -> SamplePrivacy:
    if settings.sample_privacy is None:
        raise ConfigError("private training: expected settings with sample_privacy, got none")
    return settings.sample_privacy
