"""The reservoir of a run, and the states that it ends in on a client's rows: computed once, since both are frozen.

Axes: n rows of a split, T steps of the longest, n_in values of a step, R values of a state.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clients.workspace import Workspace
from fedllm_flwr.errors import DataError
from fedllm_flwr.models.prompt_start import InputEmbeddings, embedding_table, prompt_width
from fedllm_flwr.reservoir import ControllerSpec, Reservoir, random_projection, token_series
from fedllm_flwr.seeding import derive_seed, torch_generator
from fedllm_flwr.settings.methods import FedResPromptConfig
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.series_tasks import parse_series


class Contexts:
    """Rows of one workspace to reservoir states.

    Attributes:
        spec: Sizes of the controller that reads the states.
        reservoir: The frozen network.

    Args:
        work: The workspace; its model's embedding is read if the rows are text, and nothing else of the model.
    """

    def __init__(self, work: Workspace) -> None:
        method = method_of(work)
        self._work = work
        self._ref = work.config.model.ref(work.config.runtime.model_path)
        self._kept: dict[tuple[int, str], Tensor] = {}
        self.spec: ControllerSpec = method.controller(
            work.task.series_width, prompt_width(self._ref)
        )
        self.reservoir = Reservoir(method.reservoir(work.config.seed, work.task.series_width))

    def states(self, partition_id: int, split: str) -> Tensor:
        """The states of one client's rows, in their order.

        Returns:
            float32 [n, R], kept for the next call.

        Raises:
            DataError: A row is no series, or a text without a token; names the row.
        """
        key = (partition_id, split)
        if key not in self._kept:
            rows: Sequence[Row] = getattr(self._work.rows(partition_id), split)
            kind = method_of(self._work).states
            found = self._harvested(rows) if kind == "reservoir" else self._control(rows, kind)
            self._kept[key] = found.float()
        return self._kept[key]

    def series(self, partition_id: int, split: str) -> list[np.ndarray]:
        """What the reservoir reads of one client's rows, in their order; computed anew in each call.

        Returns:
            float32 [T, n_in] of each row.

        Raises:
            DataError: As in :meth:`states`.
        """
        return self._series(getattr(self._work.rows(partition_id), split))

    def _series(self, rows: Sequence[Row]) -> list[np.ndarray]:
        width = self._work.task.series_width
        return [parse_series(row, width) for row in rows] if width else self._embedded(rows)

    def _harvested(self, rows: Sequence[Row]) -> Tensor:
        if not rows:
            return torch.empty(0, self.spec.readout_size)
        series = self._series(rows)
        lengths = torch.tensor([len(steps) for steps in series])
        batch = np.zeros((len(rows), int(lengths.max()), series[0].shape[1]), dtype=np.float32)
        for line, steps in zip(batch, series, strict=True):
            line[len(line) - len(steps) :] = steps
        return self.reservoir.harvest(torch.from_numpy(batch), lengths)

    def _embedded(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The tokens of each row's own text, cut to the task's length, as a reservoir reads them."""
        config = self._work.config
        embeddings = _embeddings(self._work)
        projection = random_projection(
            embeddings.width, self.reservoir.spec.input_size, self.reservoir.spec.seed
        )
        options = {"add_special_tokens": False, "split_special_tokens": True}
        found = []
        for row in rows:
            ids = embeddings.tokenizer(row.text, **options)["input_ids"][: config.task.max_tokens]
            if not ids:
                raise DataError(f"row {row.row_id}: expected a text with tokens, got none")
            found.append(token_series(torch.from_numpy(embeddings.rows(ids)), projection).numpy())
        return found

    def _control(self, rows: Sequence[Row], kind: str) -> Tensor:
        """States that know nothing of the rows: one for all, or one drawn for each."""
        seed = derive_seed(self._work.config.seed, "states")
        found = torch.ones(len(rows), self.spec.readout_size)
        for line, row in zip(found, rows, strict=True):
            address = (row.row_id,) if kind == "random" else ()
            line[1:] = 0.5 * torch.randn(len(line) - 1, generator=torch_generator(seed, *address))
        return found


@lru_cache(maxsize=4)
def contexts_of(work: Workspace) -> Contexts:
    """The contexts of a workspace, one object in a process."""
    return Contexts(work)


def method_of(work: Workspace) -> FedResPromptConfig:
    """The method's settings."""
    method = work.config.method
    assert isinstance(method, FedResPromptConfig)  # noqa: S101  # the table of clients says so
    return method


@lru_cache(maxsize=4)
def _embeddings(work: Workspace) -> InputEmbeddings:
    ref = work.config.model.ref(work.config.runtime.model_path)
    return embedding_table(ref, work.config.runtime.dtype)
