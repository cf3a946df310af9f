"""Local search without gradients, for models that only answer queries: a prompt in, a loss out.

A prompt is start + A z with a random matrix A that all clients share, and CMA-ES searches over z. As A is the same
for all, a mean of clients' prompts is the prompt of the mean of their z.

Axes: P values of a flat prompt, m dimension of the search, K candidates.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm_flwr.averaging import Delta
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.prompts import PromptSpec
from fedllm_flwr.seeding import derive_seed, numpy_generator
from fedllm_flwr.training.evaluate import row_scores
from fedllm_flwr.training.jobs import ClientJob, LocalResult, failed, labelled, problem_of
from fedllm_flwr.training.memory import FREE_MEMORY

LOG = logging.getLogger(__name__)
LossesOf = Callable[[np.ndarray], np.ndarray]
"""Losses [K] of flat prompts [K, P]: all that the search knows of the model."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How every client of a cohort searches in one round.

    Attributes:
        dimension: m, at least 2.
        population: Candidates of a generation, at least 4.
        generations: At least 1. A round asks for 1 + population x generations losses, the first that of the start,
            or fewer if a search has converged.
        sigma: First standard deviation of z, > 0.

    Raises:
        ConfigError: A value is out of range.
    """

    dimension: int = 64
    population: int = 8
    generations: int = 10
    sigma: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("dimension", 2), ("population", 4), ("generations", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"search {name}: expected at least {least}, got {getattr(self, name)}"
                )
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ConfigError(f"search sigma: expected a finite number > 0, got {self.sigma}")


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        prompt: The best prompt that was asked for, the start among them, float32 [P].
        loss: Its loss.
        first_loss: That of the start.
        queries: Losses asked for.
        generations: Generations done.
    """

    prompt: np.ndarray
    loss: float
    first_loss: float
    queries: int
    generations: int


@dataclass(frozen=True, eq=False)
class BlackBoxResult(LocalResult):
    """What one client did: ``loss`` is that of ``adapter`` on its rows, ``steps`` are generations.

    Attributes:
        queries: Losses asked for; in each the model has read all of the client's rows.
    """

    queries: int = 0


def random_projection(
    size: int, settings: SearchSettings, *, embedding_rms: float, seed: int
) -> np.ndarray:
    """The matrix A, the same in every process that asks alike.

    Args:
        size: Values P of a flat prompt.
        settings: Dimension and first step of the search.
        embedding_rms: Root mean square of the model's input embeddings
            (:attr:`fedllm_flwr.models.prompt_start.InputEmbeddings.mean_rms`).
        seed: Address of the draws, common to all clients and rounds.

    Returns:
        float32 [P, m], normal with standard deviation embedding_rms / (sqrt(m) sigma), so that the first
        candidates differ from the start by about the size of an embedding.

    Source:
        Sun et al. 2022 (Black-Box Tuning), section 3, for the subspace; Sun et al. 2022 (BBTv2) for normal entries of
        this scale, with its factor alpha = 1. Differs in that a root mean square stands for the standard deviation
        of the embeddings, whose mean is near zero.
    """
    spread = embedding_rms / (math.sqrt(settings.dimension) * settings.sigma)
    draws = numpy_generator(seed, "projection").standard_normal((size, settings.dimension))
    return (spread * draws).astype(np.float32)


def search(
    losses_of: LossesOf,
    start: np.ndarray,
    projection: np.ndarray,
    settings: SearchSettings,
    seed: int,
) -> Found:
    """Search the subspace around a prompt with CMA-ES.

    The result is the best query and not the mean of the search distribution: that was never asked for, and since
    every query reads the same rows, losses have no noise that would make the best look better than it is on them.
    So the result is never worse on these rows than the start, and with more generations never worse than with fewer.

    Args:
        losses_of: The model. A loss that is not finite counts as the worst of its generation.
        start: The prompt to begin with [P].
        projection: A [P, m]; zero rows keep their values.
        settings: How to search.
        seed: Address of the draws.

    Raises:
        ShapeError: Start, projection and dimension do not fit.
        ArithmeticError: The loss of the start is not finite.

    Source:
        Sun et al. 2022, section 3; Hansen 2016 (The CMA Evolution Strategy), in the implementation of package cma. As
        in FedBPT (Sun et al. 2023) clients search the same subspace; differs from it in that a round begins with a
        round distribution at the global prompt, and neither covariance nor step size is averaged.
    """
    if projection.shape != (start.size, settings.dimension) or start.ndim != 1:
        raise ShapeError(
            f"search: expected a projection of ({start.size}, {settings.dimension}) to flat prompts, "
            f"got {projection.shape} and prompts of shape {start.shape}"
        )
    [first_loss] = (float(loss) for loss in losses_of(start[None]))
    if not math.isfinite(first_loss):
        raise ArithmeticError(f"loss is {first_loss} before the first step")
    best, best_loss = start.astype(np.float32), first_loss
    strategy = _strategy(settings, seed)
    queries, generations = 1, 0
    while generations < settings.generations and not strategy.stop():
        candidates = strategy.ask()
        prompts = (start + np.stack(candidates) @ projection.T).astype(np.float32)
        losses = np.asarray(losses_of(prompts), dtype=np.float64)
        queries, generations = queries + len(prompts), generations + 1
        finite = np.isfinite(losses)
        if not finite.any():
            break
        if losses[finite].min() < best_loss:
            index = int(np.where(finite, losses, np.inf).argmin())
            best, best_loss = prompts[index], float(losses[index])
        strategy.tell(candidates, np.where(finite, losses, losses[finite].max() + 1.0).tolist())
    return Found(best, best_loss, first_loss, queries, generations)


def train_black_box(
    backbone: Backbone,
    jobs: Sequence[ClientJob],
    settings: SearchSettings,
    projection: np.ndarray,
    *,
    head_token_ids: tuple[int, ...] | None = None,
    fixed_ids: tuple[int, ...] = (),
    delta: Delta | None = None,
) -> list[BlackBoxResult]:
    """Let clients search, one after the other; one that fails is reported and does not disturb the others.

    The model is only evaluated. Global random state is neither read nor changed.

    Args:
        backbone: The shared model.
        jobs: The clients. The loss is that of :func:`fedllm_flwr.training.local.train`, over all rows at once.
        settings: How each of them searches.
        projection: A [P, m], common to all clients.
        head_token_ids: As in training.
        fixed_ids: As in training.
        delta: As in training.

    Returns:
        One result per job, in order. ``error`` is set where a client has no usable rows or raises.
    """
    results = []
    common = (head_token_ids, fixed_ids, delta)
    for job in jobs:
        reason = problem_of(job)
        try:
            if not reason:
                results.append(_searched(backbone, labelled(job), settings, projection, common))
                continue
        except Exception as error:
            LOG.debug("client %d failed", job.partition_id, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        results.append(BlackBoxResult(**vars(failed(job, reason))))
    FREE_MEMORY.release()
    return results


def _searched(
    backbone: Backbone,
    job: ClientJob,
    settings: SearchSettings,
    projection: np.ndarray,
    common: tuple[tuple[int, ...] | None, tuple[int, ...], Delta | None],
) -> BlackBoxResult:
    """One client's search."""
    began = time.process_time()
    weights = 1.0 if job.row_weights is None else job.row_weights
    head_token_ids, fixed_ids, delta = common

    def loss_of(prompt: np.ndarray) -> float:
        sums, tokens, _ = row_scores(
            backbone,
            job.rows,
            head_token_ids=head_token_ids,
            adapter=prompt,
            spec=job.spec,
            fixed_ids=fixed_ids,
            delta=delta,
        )
        return float((weights * sums).sum() / tokens.sum())

    found = search(
        lambda prompts: np.array([loss_of(prompt) for prompt in prompts]),
        job.adapter,
        _of_trained(job, projection),
        settings,
        derive_seed(job.seed, "search"),
    )
    return BlackBoxResult(
        partition_id=job.partition_id,
        adapter=found.prompt,
        first_loss=found.first_loss,
        loss=found.loss,
        num_examples=len(job.rows),
        steps=found.generations,
        tokens=found.queries * sum(len(row.input_ids) for row in job.rows),
        cpu_seconds=time.process_time() - began,
        queries=found.queries,
    )


def _of_trained(job: ClientJob, projection: np.ndarray) -> np.ndarray:
    """The projection with zero rows for the segments that are not trained."""
    if not job.trained:
        return projection
    if not isinstance(job.spec, PromptSpec):
        raise ConfigError(f"search: expected no segments of a {type(job.spec).__name__} to train")
    moves = job.spec.trained_rows(job.trained)
    width = len(projection) // job.spec.length
    return projection * np.repeat(moves, width)[:, None]


def _strategy(settings: SearchSettings, seed: int) -> Any:
    import cma  # it imports matplotlib's pyplot, which nobody else here needs

    draws = numpy_generator(seed, "cma")
    options = {
        "popsize": settings.population,
        "randn": lambda *shape: draws.standard_normal(shape),
        "seed": math.nan,  # leave NumPy's global generator alone
        "verbose": -9,
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(np.zeros(settings.dimension), settings.sigma, options)
