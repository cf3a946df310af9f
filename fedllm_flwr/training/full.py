"""Local training of whole matrices: a client changes its own copy of some of the backbone's weights.

On the way back through the model each trained layer hands the factors of its gradient to its own optimizer, which uses
what it needs of them before the layer below is reached; the gradients of two blocks are never held together.

Axes: m rows of a matrix, on the side that the settings name.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from fedllm_flwr.errors import ConfigError, DataError, FedLLMError, ShapeError
from fedllm_flwr.grass.base import MatrixOptimizer
from fedllm_flwr.grass.dense import DenseMatrix
from fedllm_flwr.grass.galore import GaloreMatrix, GaloreSettings
from fedllm_flwr.grass.linear import Receive, widen
from fedllm_flwr.grass.optimizer import GrassMatrix, GrassSettings, Side, gradient_norms
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import RowRule
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, label_tokens, plan_steps
from fedllm_flwr.training.full_job import FullJob, FullResult, FullSettings
from fedllm_flwr.training.full_layers import (
    Updates,
    check_updates,
    private_weight,
    updated_rows,
    updates_active,
    weight_of,
)
from fedllm_flwr.training.full_passes import forward, hooked_model
from fedllm_flwr.training.memory import FREE_MEMORY

LOG = logging.getLogger(__name__)
UNIFORM = ("uniform_r", "uniform_nr")


class FullTrainer:
    """The matrices of one client while they train.

    Args:
        backbone: The shared model; only read.
        job: What to train.
        settings: How.

    Attributes:
        tokens: Input tokens read, padding not counted.

    Raises:
        ConfigError: A target module names no linear layer, a rank is above a matrix's side, or rows were given and
            the method picks none.
        ShapeError: Start values or given rows do not fit a matrix.
    """

    def __init__(self, backbone: Backbone, job: FullJob, settings: FullSettings) -> None:
        self.tokens = 0
        self._backbone = backbone
        self._job = job
        self._settings = settings
        self._layers = backbone.target_layers(job.target_modules)
        check_updates(backbone, job.start, settings.side)
        unknown = sorted(set(job.start) - set(self._layers))
        if unknown:
            raise ConfigError(f"start: expected only layers that are trained, got {unknown[0]}")
        if job.shared_rows is not None and not isinstance(settings.projection, GrassSettings):
            raise ConfigError("shared rows: expected GRASS, got a method that picks no rows")
        if job.shared_rows is not None and set(job.shared_rows) != set(self._layers):
            wrong = sorted(set(job.shared_rows) ^ set(self._layers))[0]
            raise ShapeError(f"shared rows: expected those of every trained layer, got no {wrong}")
        self._weights = {
            name: private_weight(layer, job.start.get(name), settings.side)
            for name, layer in self._layers.items()
        }
        self._matrices = {name: self._matrix(name) for name in self._layers}
        self._model = hooked_model(
            backbone,
            self._weights,
            {name: self._receiver(matrix) for name, matrix in self._matrices.items()},
            checkpointing=settings.checkpointing,
        )
        self._is_last = False

    def active(self) -> AbstractContextManager[object]:
        """The private matrices are in the model; the plain ones are back afterwards, also after an error."""
        return self._model.active()

    def step(self, shares: Sequence[Share], head_token_ids: tuple[int, ...] | None) -> float:
        """One update from the micro-batches of a step, while active.

        Args:
            shares: The micro-batches; their weighted losses are summed.
            head_token_ids: As in :meth:`fedllm_flwr.models.backbone.Backbone.row_losses`.

        Returns:
            The loss before the update. If it is not finite, nothing was updated and training cannot go on.
        """
        total = 0.0
        for share in shares:
            hidden, slope, loss = forward(self._backbone, self._model, share, head_token_ids)
            total += loss
            if not math.isfinite(total):
                break
            self._is_last = share is shares[-1]
            self._model.backward(hidden, slope)
            self.tokens += share.tokens
        return total

    def updates(self) -> dict[str, RowUpdate]:
        """Per matrix, what its rows have changed by since the start."""
        found = {}
        for name, matrix in self._matrices.items():
            indices, values = matrix.changed()
            update = self._job.start.get(name)
            shared = weight_of(self._layers[name])
            start = widen(updated_rows(shared, update, indices, self._settings.side))
            found[name] = RowUpdate(indices, (values - start).float().cpu().numpy())
        return found

    def state_bytes(self) -> int:
        """Bytes that the optimizers hold from one step to the next."""
        return sum(matrix.state_bytes() for matrix in self._matrices.values())

    def weight_bytes(self) -> int:
        """Bytes of the private matrices."""
        return sum(weight.nbytes for weight in self._weights.values())

    def _matrix(self, name: str) -> MatrixOptimizer:
        weight, projection, base = (
            self._weights[name],
            self._settings.projection,
            self._settings.base,
        )
        if isinstance(projection, GrassSettings):
            rows = None if self._job.shared_rows is None else self._job.shared_rows[name]
            draws = numpy_generator(self._job.seed, "rows", name)
            return GrassMatrix(weight, projection, base, draws, rows=rows)
        if isinstance(projection, GaloreSettings):
            return GaloreMatrix(weight, projection, base)
        return DenseMatrix(weight, base)

    def _receiver(self, matrix: MatrixOptimizer) -> Receive:
        def receive(slope: Tensor, inputs: Tensor) -> None:
            matrix.add(slope, inputs)
            if self._is_last:
                matrix.step()

        return receive


def train_full(
    backbone: Backbone,
    job: FullJob,
    settings: FullSettings,
    *,
    head_token_ids: tuple[int, ...] | None = None,
) -> FullResult:
    """Train whole matrices of a client's own copy of the model.

    Global random state is neither read nor changed, and the backbone is plain and bit-equal afterwards.

    Args:
        backbone: The shared model.
        job: The client.
        settings: How it trains.
        head_token_ids: As in :func:`fedllm_flwr.training.local.train`.

    Returns:
        ``error`` is set if the client has no usable rows, the job does not fit the model, something raises, or a loss
        or a weight is not finite.
    """
    began = time.process_time()
    try:
        rows = labelled_rows(job.rows)
        losses, trainer = _run(backbone, job, settings, rows, head_token_ids)
        updates = trainer.updates()
        for name, update in updates.items():
            if not np.isfinite(update.values).all():
                raise FedLLMError(f"layer {name}: weights are not finite after step {len(losses)}")
    except Exception as error:
        LOG.debug("client %d failed", job.partition_id, exc_info=True)
        return _failed(job, f"{type(error).__name__}: {error}")
    finally:
        FREE_MEMORY.release()
    return FullResult(
        partition_id=job.partition_id,
        updates=updates,
        first_loss=losses[0],
        loss=sum(losses) / len(losses),
        num_examples=len(rows),
        steps=len(losses),
        tokens=trainer.tokens,
        cpu_seconds=time.process_time() - began,
    )


def labelled_rows(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows that have label tokens: those that a client trains on.

    Raises:
        DataError: There are none.
    """
    kept = [row for row in rows if len(row.targets)]
    if not kept:
        raise DataError(f"expected rows with label tokens, got none in {len(rows)} rows")
    return kept


def row_norms(
    backbone: Backbone,
    rows: Sequence[Encoded],
    target_modules: tuple[str, ...],
    *,
    rule: RowRule = "norm_nr",
    side: Side = "out",
    start: Updates | None = None,
    head_token_ids: tuple[int, ...] | None = None,
) -> dict[str, np.ndarray]:
    """What a row rule reads of the gradient of one batch's mean loss; no dense gradient is kept.

    Args:
        backbone: The shared model.
        rows: The batch, computed in one pass; with at least one label token.
        target_modules: As in :class:`FullJob`.
        rule: Whose norms: those of the gradient's rows, or under ``frozen_pass`` of the columns of dL/dY.
        side: What a row is.
        start: As in :class:`FullJob`.
        head_token_ids: As in :func:`train_full`.

    Returns:
        Squared norms by full layer name, float64 [m].

    Raises:
        ConfigError: A target module names no linear layer, the rule reads no norms, or there are no label tokens.
        ShapeError: Start values do not fit a matrix.
    """
    if rule in UNIFORM:
        raise ConfigError(f"row norms: expected a rule that reads norms, got {rule}")
    if not (count := label_tokens(rows)):
        raise ConfigError(
            f"row norms: expected rows with label tokens, got none in {len(rows)} rows"
        )
    layers = backbone.target_layers(target_modules)
    found: dict[str, np.ndarray] = {}

    def receiver(name: str) -> Receive:
        def receive(slope: Tensor, inputs: Tensor) -> None:
            norms = gradient_norms(slope, inputs, rule, side)
            assert norms is not None  # noqa: S101  # only uniform rules have none
            found[name] = norms.double().cpu().numpy()

        return receive

    with updates_active(backbone, start or {}, side):
        weights = {name: weight_of(layer) for name, layer in layers.items()}
        model = hooked_model(backbone, weights, {name: receiver(name) for name in layers})
        with model.active():
            hidden, slope, _ = forward(backbone, model, Share(rows, 1.0 / count), head_token_ids)
            model.backward(hidden, slope)
    return {name: found[name] for name in layers}


def _run(
    backbone: Backbone,
    job: FullJob,
    settings: FullSettings,
    rows: Sequence[Encoded],
    head_token_ids: tuple[int, ...] | None,
) -> tuple[list[float], FullTrainer]:
    """All steps; the loss of each."""
    trainer = FullTrainer(backbone, job, settings)
    losses: list[float] = []
    with trainer.active():
        for planned in plan_steps(len(rows), settings.local, job.seed):
            micro_batches = [[rows[i] for i in indices] for indices in planned]
            weight = 1.0 / sum(label_tokens(batch) for batch in micro_batches)
            shares = [Share(batch, weight) for batch in micro_batches]
            losses.append(trainer.step(shares, head_token_ids))
            if not math.isfinite(losses[-1]):
                raise FedLLMError(f"loss is {losses[-1]} at step {len(losses)}")
    return losses, trainer


def _failed(job: FullJob, reason: str) -> FullResult:
    """The result of a client that has none, with the first line of the reason."""
    return FullResult(
        partition_id=job.partition_id,
        updates={},
        first_loss=math.nan,
        loss=math.nan,
        num_examples=0,
        steps=0,
        tokens=0,
        cpu_seconds=0.0,
        error=f"client {job.partition_id}: {reason}".splitlines()[0],
    )
